"""A text-to-image model of one's own: its tokenizer, and the pipeline around it."""

import torch
from diffusers import StableDiffusion3Pipeline

from domainstudio import config, models
from domainstudio.config import FlowModelSettings, NoiseSettings, TextModelSettings
from domainstudio.demo.flow_model import new_flow_pipeline
from domainstudio.demo.text_model import BEGIN, END, new_pipeline, new_tokenizer
from domainstudio.models.stable_diffusion import StableDiffusionDenoiser
from domainstudio.models.stable_diffusion_3 import StableDiffusion3Denoiser
from domainstudio.sampling import sample
from domainstudio.training.cards import source_card
from tests.models import PROMPT_LENGTH, PROMPTS, image_set, tiny_images, tiny_text_pipeline


def test_the_same_corpus_gives_the_same_tokens():
    """A resumed training makes its tokenizer again."""
    vocabularies = [new_tokenizer(PROMPTS, 600, 16) for _ in range(3)]
    first = vocabularies[0].backend_tokenizer.to_str()
    assert all(each.backend_tokenizer.to_str() == first for each in vocabularies)


def test_words_of_the_corpus_are_tokens_and_nothing_is_unknown():
    tokenizer = new_tokenizer(PROMPTS, 600, 16)
    begin, end = tokenizer.convert_tokens_to_ids([BEGIN, END])
    assert len(tokenizer("red house").input_ids) == 4
    ids = tokenizer("Zebra, 7 ø 漢 [V]!").input_ids
    assert ids[0] == begin and ids[-1] == end and end not in ids[1:-1]
    assert tokenizer.decode(ids[1:-1]).replace(" ", "") == "zebra,7ø漢[v]!"


def test_the_vocabulary_has_the_size_asked_for():
    corpus = [f"{a}{b}{c}" for a in "abcdef" for b in "aeiou" for c in "klmnop"]
    assert len(new_tokenizer(corpus, 530, 16)) == 530


def test_a_new_pipeline_is_complete(tmp_path):
    settings = TextModelSettings(
        block_out_channels=(8, 16),
        attention=(False, True),
        attention_heads=2,
        norm_num_groups=4,
        text_width=32,
        text_layers=1,
        vocabulary=600,
        prompt_length=12,
    )
    pipeline = new_pipeline(settings, NoiseSettings(), tiny_text_pipeline().vae, 16, PROMPTS)
    denoiser = StableDiffusionDenoiser(pipeline, "new")
    assert denoiser.resolution == (16, 16) and denoiser.shape == (4, 8, 8)
    assert denoiser.condition(PROMPTS)["encoder_hidden_states"].shape == (len(PROMPTS), 12, 32)
    assert denoiser.schedule.levels[-1] == 0  # zero terminal SNR
    denoiser.save(tmp_path)
    drawn = [sample(each, [1], ["a cup"], steps=2).astype(int) for each in (denoiser, models.load(tmp_path))]
    assert abs(drawn[0] - drawn[1]).max() <= 1


def test_a_flow_matching_model_is_made_around_a_text_models_parts(tmp_path):
    """Plain diffusers draws the same from its folder, where T5's tokens are one of zeros."""
    text = tiny_text_pipeline()
    settings = FlowModelSettings(num_layers=2, num_attention_heads=2, attention_head_dim=16)
    pipeline = new_flow_pipeline(settings, text)
    denoiser = StableDiffusion3Denoiser(pipeline, "new")
    condition = denoiser.condition(["a red house"])
    assert condition["encoder_hidden_states"].shape == (1, PROMPT_LENGTH + 1, 32)
    pooled = text.text_encoder(denoiser._tokens(["a red house"])[0][:, 0]).pooler_output
    torch.testing.assert_close(condition["pooled_projections"], torch.cat([pooled, pooled], dim=1))
    with torch.no_grad():
        for parameter in denoiser.denoising.proj_out.parameters():
            assert not parameter.any(), "an untrained block is the identity"
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    denoiser.save(tmp_path)
    found = sample(models.load(tmp_path), [3], ["a red house"], steps=3)
    plain = StableDiffusion3Pipeline.from_pretrained(tmp_path, text_encoder_3=None)
    draw = torch.Generator().manual_seed(3)
    options = {"num_inference_steps": 3, "guidance_scale": 1.0, "max_sequence_length": 1}
    picture = plain("a red house", generator=draw, output_type="np", **options).images[0]
    assert abs(found[0].transpose(1, 2, 0) - picture * 255).max() < 1


def test_a_flow_matching_models_card_says_how_it_was_trained():
    section = config.load().pretrain_flow.model_dump(mode="json")
    history = [{"simple": 1.0, "seconds": 60.0}]
    card = source_card("Text-to-image model", section, image_set(tiny_images(3)), history)
    assert (
        "| blocks, heads, channels of a head | 6, 6, 32 |\n| noise | flow matching, shift 1 |\n| steps"
        in card
    )
