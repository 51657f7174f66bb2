"""A text-to-image model of one's own: its tokenizer, and the pipeline around it."""

from domainstudio import models
from domainstudio.config import NoiseSettings, TextModelSettings
from domainstudio.demo.text_model import BEGIN, END, new_pipeline, new_tokenizer
from domainstudio.models.stable_diffusion import StableDiffusionDenoiser
from domainstudio.sampling import sample
from tests.models import PROMPTS, tiny_text_pipeline


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
