"""A small text-to-image model of one's own: tokenizer, text encoder, VAE and UNet as one pipeline."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from domainstudio.errors import MissingExtraError

if TYPE_CHECKING:
    from domainstudio.config import NoiseSettings, TextModelSettings

BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def new_pipeline(
    settings: TextModelSettings,
    noise: NoiseSettings,
    vae: AutoencoderKL,
    resolution: int,
    corpus: Sequence[str],
) -> StableDiffusionPipeline:
    """Return an untrained pipeline around a trained VAE, initialised from torch's global generator.

    Args:
        settings: sizes of the parts.
        noise: the forward diffusion.
        vae: the autoencoder, with its scaling factor.
        resolution: height and width of the images, in pixels.
        corpus: prompts to learn the vocabulary from.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    tokenizer = new_tokenizer(corpus, settings.vocabulary, settings.prompt_length)
    scheduler = DDIMScheduler(
        **noise.model_dump(),
        timestep_spacing="trailing",
        steps_offset=1,  # the pipeline insists; trailing timesteps have none
        clip_sample=False,
        set_alpha_to_one=True,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=_new_text_encoder(settings, tokenizer),
        tokenizer=tokenizer,
        unet=_new_unet(settings, vae, resolution),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _new_text_encoder(settings: TextModelSettings, tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    width = settings.text_width
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=settings.text_layers,
            num_attention_heads=width // 32,
            max_position_embeddings=settings.prompt_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )


def _new_unet(settings: TextModelSettings, vae: AutoencoderKL, resolution: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=resolution // 2 ** (len(vae.config.block_out_channels) - 1),
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        layers_per_block=settings.layers_per_block,
        block_out_channels=settings.block_out_channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in settings.attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in settings.attention[::-1]),
        cross_attention_dim=settings.text_width,
        attention_head_dim=settings.attention_heads,  # diffusers' name for the number of heads here
        norm_num_groups=settings.norm_num_groups,
        # The prompt also reaches every residual block, pooled and beside the timestep: from scratch, cross
        # attention alone takes many times as long to obey it.
        addition_embed_type="text",
        addition_embed_type_num_heads=settings.attention_heads,
        resnet_time_scale_shift="scale_shift",
    )


def new_tokenizer(corpus: Sequence[str], vocabulary: int, length: int) -> Any:
    """Learn a byte-pair vocabulary from prompts, in the format of CLIP's tokenizer.

    As in CLIP's, every byte is a token, within a word and at its end, so nothing is unknown. The same corpus
    gives the same tokens in every process: a resumed training depends on it.

    Args:
        corpus: prompts.
        vocabulary: largest number of tokens, if it is above the 514 that are always there.
        length: tokens of a prompt, begin and end included.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    try:
        from tokenizers import Tokenizer
        from tokenizers.models import BPE
        from tokenizers.pre_tokenizers import ByteLevel
        from tokenizers.trainers import BpeTrainer
        from transformers import CLIPTokenizer
    except ImportError as error:
        raise MissingExtraError(
            'a text-to-image model needs transformers. Install it: pip install "domainstudio[text]"'
        ) from error

    clip = CLIPTokenizer()
    learner = Tokenizer(BPE(end_of_word_suffix="</w>", unk_token=END))
    learner.normalizer = clip.backend_tokenizer.normalizer
    learner.pre_tokenizer = clip.backend_tokenizer.pre_tokenizer
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        # left to the trainer, ends of words are numbered in an order that differs between processes
        special_tokens=[BEGIN, END, *alphabet, *(f"{byte}</w>" for byte in alphabet)],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(corpus, trainer)
    with tempfile.TemporaryDirectory() as folder:
        learner.model.save(folder)
        tokens = json.loads(Path(folder, "vocab.json").read_text(encoding="utf-8"))
        merges = Path(folder, "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    return CLIPTokenizer(
        vocab=tokens,
        merges=[tuple(line.split()) for line in merges],
        unk_token=END,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        model_max_length=length,
    )
