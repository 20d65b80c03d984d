"""Captions: as the condition of a prior, as token ids, on disk beside the codes, and at the prompt."""

import itertools
import json
import pickle
import shutil
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from pipelines import Pipeline
from pipelines.checkpoint import build_prior, build_tokenizer, fingerprint
from pipelines.code_writing import write_codes
from pipelines.codes import CodeDataset
from pipelines.conditions import condition_on
from pipelines.images import DataConfig, load_images
from pipelines.objectives import PriorLoss, unigram_nats_per_code
from pipelines.pictures import save_samples
from pipelines.stages import save_stage_two
from pipelines.text import TextConfig, TextTokenizer
from prior import PRIORS, CodeSpec
from prior.base import PADDING
from prior.gpt import rotary_table
from prior.sampling import ImageNoise
from prior.torchvision_guard import ensure_torchvision
from tests import tiny
from tests.test_scripts import SHORT, TINY_PRIOR, TINY_TOKENIZER, launch, run
from tokenizer.base import Tokenizer

SPEC = CodeSpec(((1, 2), (2, 2)), (3, 2))
# By variant: (prior, options)
VARIANTS = {
    **{positions: ("gpt", {"positions": positions}) for positions in ("learned", "rotary", "rotary_2d")},
    **{name: (name, {}) for name, prior in PRIORS.items() if prior.takes_text and name != "gpt"},
}
VOCAB_SIZE, LENGTH = 6, 3
TEXT = {"text_vocab_size": VOCAB_SIZE, "max_text_length": LENGTH}
EMPTY = [PADDING] * LENGTH
# Full, padded, another order of the same, empty
CAPTIONS = torch.tensor([[0, 5, 2], [4, 1, PADDING], [1, 4, PADDING], EMPTY])


def build(variant="learned", spec=SPEC, **options):
    """The tiny prior with captions, a GPT by default, with parameters far from their initial values."""
    name, of_variant = VARIANTS[variant]
    config = {"spec": spec, **TEXT, **tiny.PRIORS[name], **of_variant, **options}
    prior = PRIORS[name](PRIORS[name].Config(**config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += 0.4 * torch.randn(parameter.shape, generator=generator)
    return prior.eval()


def random_codes(n, spec=SPEC, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(k, (n, *shape), generator=g) for shape, k in zip(spec.shapes, spec.vocab_sizes))


def all_codes(spec=SPEC):
    sizes = [k for n, k in zip(spec.lengths, spec.vocab_sizes) for _ in range(n)]
    return spec.unflatten(torch.tensor(list(itertools.product(*map(range, sizes)))))


@torch.no_grad()
def distribution(prior, caption):
    """p(codes | caption) of all codes."""
    codes = all_codes(prior.spec)
    return prior.log_prob(codes, torch.as_tensor(caption).expand(len(codes[0]), -1)).double().exp()


# The prior
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caption", CAPTIONS.tolist(), ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_probabilities_given_a_caption_sum_to_one(variant, caption):
    assert distribution(build(variant), caption).sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_word_its_place_and_the_length_of_a_caption_matter(variant):
    prior = build(variant)
    variants = [*CAPTIONS.tolist(), [0, 5, 3], [0, 4, 2], [1, 5, 2], [4, PADDING, PADDING]]
    for one, other in itertools.combinations(variants, 2):
        assert (distribution(prior, one) - distribution(prior, other)).abs().sum() > 0.01, (one, other)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_cached_logits_equal_those_of_the_full_pass_at_every_position(variant):
    prior, codes = build(variant), random_codes(4)
    full = [logits for level in prior.logits(codes, CAPTIONS) for logits in level.unbind(1)]
    steps, sent = prior.steps(CAPTIONS), None
    for expected, code in zip(full, SPEC.flatten(codes).unbind(1), strict=True):
        torch.testing.assert_close(steps.send(sent), expected, atol=1e-4, rtol=1e-4)  # float32 sums in another order
        sent = code


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_sample_equals_that_of_a_loop_over_full_passes_with_and_without_the_caption(variant, scale):
    prior = build(variant)
    sequence = torch.zeros(4, SPEC.length, dtype=torch.int64)
    uniform = ImageNoise(4, torch.Generator().manual_seed(5), torch.device("cpu")).uniform(SPEC.length)
    for i in range(SPEC.length):
        passes = (prior.logits(SPEC.unflatten(sequence), c) for c in (CAPTIONS, torch.full_like(CAPTIONS, PADDING)))
        given_caption, without = ([z for level in logits for z in level.unbind(1)][i].double() for logits in passes)
        cumulative = (without + scale * (given_caption - without)).softmax(-1).cumsum(-1)
        sequence[:, i] = (cumulative <= uniform[:, i : i + 1]).sum(1)
    sampled = prior.sample(4, CAPTIONS, guidance_scale=scale, generator=torch.Generator().manual_seed(5))
    assert SPEC.flatten(sampled).equal(sequence)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_an_image_depends_on_its_own_caption_and_generator_alone(scale):
    prior = build()
    seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]
    together = prior.sample(4, CAPTIONS, generator=seeds, guidance_scale=scale)
    for i in range(4):
        seed = [torch.Generator().manual_seed(i)]
        alone = prior.sample(1, CAPTIONS[i : i + 1], generator=seed, guidance_scale=scale)
        assert all(a[0].equal(t[i]) for a, t in zip(alone, together))


def test_sampling_computes_a_caption_once_and_guidance_takes_one_pass():
    prior, computed = build(), []
    prior.model.embed_tokens.register_forward_hook(lambda module, inputs, output: computed.append(inputs[0].shape))
    prior.sample(4, CAPTIONS, guidance_scale=2.0)
    assert computed == [(8, LENGTH + 1)] + [(8, 1)] * (SPEC.length - 1)


@torch.no_grad()
def test_logits_see_all_codes_before_them_and_none_after():
    prior, codes = build(), random_codes(1)
    before = prior.logits(codes, CAPTIONS[1:2])
    for j in range(SPEC.length):
        sequence = SPEC.flatten(codes).clone()
        sequence[0, j] = 1 - sequence[0, j].clamp(max=1)
        after = prior.logits(SPEC.unflatten(sequence), CAPTIONS[1:2])
        moved = torch.cat([(a != b).any(-1)[0] for a, b in zip(after, before)])
        assert moved.tolist() == [i > j for i in range(SPEC.length)]


def test_every_place_has_a_padding_token_of_its_own():
    prefix = build().prefix(CAPTIONS).tolist()
    assert prefix == [
        [6, 11, 8, 5],
        [10, 7, 14, 5],
        [7, 10, 14, 5],
        [12, 13, 14, 5],
    ]  # codes 0-4, null class 5, ids 6-11
    assert build().lm_head.out_features == 15


def test_captions_cost_other_priors_nothing():
    plain = build(text_vocab_size=0, max_text_length=0)
    assert (plain.lm_head.out_features, len(plain.model.embed_positions.weight)) == (6, SPEC.length)
    assert plain.prefix(torch.tensor([0])).tolist() == [[5]]


def test_captions_lie_on_the_diagonal_that_ends_before_the_first_code():
    prior = build("rotary_2d", CodeSpec(((2, 2),), (3,)))
    angles = torch.atan2(*rotary_table(prior.config, torch.device("cpu")).flip(0))
    by_row, by_column = angles[:, 0], angles[:, angles.shape[1] // 2]  # the pairs of the shortest wavelength
    assert torch.allclose(by_row, torch.tensor([-3.0, -2, -1, 0, 0, 1, 1]))
    assert torch.allclose(by_column, torch.tensor([-3.0, -2, -1, 0, 1, 0, 1]))


def test_training_drops_captions_as_often_as_asked_and_log_prob_never():
    prior = build(class_dropout=0.25)
    codes, captions = (
        tuple(code.expand(8000, *code.shape[1:]) for code in random_codes(1)),
        CAPTIONS[:1].expand(8000, -1),
    )
    with torch.no_grad():
        given_caption, without = (
            -prior.log_prob(codes, c)[0] / SPEC.length for c in (captions, captions * 0 + PADDING)
        )
        mixed = prior.train()(codes, captions)["nll"]
        assert prior.log_prob(codes, captions).allclose(-given_caption * SPEC.length)
    # a binomial fraction: five standard deviations of sqrt(0.25 * 0.75 / 8000)
    assert ((mixed - given_caption) / (without - given_caption)).item() == pytest.approx(0.25, abs=0.025)


@pytest.mark.parametrize("variant", [variant for variant, (name, _) in VARIANTS.items() if name == "gpt"])
def test_every_parameter_receives_a_gradient(variant):
    prior = build(variant, class_dropout=0.0).train()
    prior(random_codes(4), CAPTIONS)["nll"].backward()
    assert [n for n, p in prior.named_parameters() if p.grad is None or not p.grad.any()] == []
    used = prior.model.embed_tokens.weight.grad[6:].any(1)  # ids 0-5, then the padding of places 0-2
    assert used.tolist() == [True] * 3 + [False] + [True] * 5


def test_a_prior_learns_what_captions_say():
    torch.manual_seed(0)
    spec = CodeSpec(((2, 2),), (5,))
    prior = PRIORS["gpt"](PRIORS["gpt"].Config(spec=spec, text_vocab_size=5, max_text_length=4, **tiny.PRIORS["gpt"]))
    optimizer = torch.optim.Adam(prior.parameters(), lr=0.01)
    for _ in range(150):
        captions = torch.randint(5, (64, 4))
        optimizer.zero_grad()
        prior((captions.flip(1).view(-1, 2, 2),), captions)["nll"].backward()
        optimizer.step()
    captions = torch.randint(5, (200, 4))
    sampled = prior.eval().sample(200, captions, guidance_scale=2.0, generator=torch.Generator().manual_seed(0))
    assert (sampled[0].flatten(1) == captions.flip(1)).float().mean() > 0.9  # 0.2 without the captions


@torch.no_grad()
def test_gpt_and_llama_agree_on_captions():
    ensure_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM

    prior, codes = build("rotary"), random_codes(4)
    llama = LlamaForCausalLM(LlamaConfig(**prior.llama_config())).eval()
    llama.load_state_dict(prior.state_dict())
    tokens = torch.cat([prior.prefix(CAPTIONS), codes[0].flatten(1), codes[1].flatten(1) + 3], dim=1)
    assert tokens.shape[1] <= llama.config.max_position_embeddings
    theirs = llama(input_ids=tokens).logits[:, LENGTH:-1].split(SPEC.lengths, dim=1)
    theirs = [logits[..., start:stop] for logits, start, stop in zip(theirs, (0, 3), (3, 5))]
    torch.testing.assert_close(list(prior.logits(codes, CAPTIONS)), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (None, "conditional on captions: give the token ids"),
        (torch.zeros(2, 4).long(), r"int64 of shape \(2, 3\), got torch.int64 of shape \(2, 4\)"),
        (torch.zeros(2, 3), "got torch.float32"),
        (torch.tensor([[0, 1, 6]] * 2), r"lie in \[0, 6\), or be -1 for padding, got values from 0 to 6"),
        (torch.tensor([[0, -2, -2]] * 2), "got values from -2 to 0"),
        (torch.tensor([[0, -1, 3]] * 2), "only stand after the last token"),
        (torch.tensor([[-1, 1, 3]] * 2), "only stand after the last token"),
    ],
)
def test_wrong_captions_are_refused(captions, message):
    prior = build()
    for call in (lambda: prior.sample(2, captions), lambda: prior.log_prob(random_codes(2), captions)):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 2}, "conditional on classes or on captions, got num_classes = 2 and text_vocab_size = 6"),
        ({"max_text_length": 0}, "must both be at least 1, or both 0 for a prior without captions, got 6 and 0"),
        ({"text_vocab_size": -1}, "got -1 and 3"),
    ],
)
def test_impossible_conditions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize("name", [name for name, prior in PRIORS.items() if not prior.takes_text])
def test_priors_that_take_no_captions_say_so(name):
    specs = [*tiny.SPECS.values(), *tiny.REAL_SPECS.values()]
    spec = next(spec for spec in specs if tiny.takes(name, spec))
    with pytest.raises(ValueError, match="cannot be conditional on captions; take the prior 'gpt'"):
        PRIORS[name](PRIORS[name].Config(spec=spec, **TEXT, **tiny.PRIORS[name]))


def test_guidance_needs_captions_to_have_been_dropped():
    with pytest.raises(ValueError, match="trained without class dropout"):
        build(class_dropout=0.0).sample(4, CAPTIONS, guidance_scale=2.0)


# Captions as token ids
# ------------------------------------------------------------------------------------------------

SOME = ["a three left of a seven", "a five above an eight", "an eight below a three", "a seven left of a five", "a one"]
SOME += SOME  # a merge needs two occurrences


def train(captions=SOME, others=(), **options):
    return TextTokenizer.train(captions, TextConfig(**options), others=others)


def normalized(text):
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


@given(st.lists(st.text(st.sampled_from("abcD é\té\n東京.,'!🙂0Ġ")), min_size=1, max_size=4))
def test_any_text_survives_up_to_case_and_white_space(texts):
    tokenizer = train(max_length=200)
    ids, num_cut = tokenizer.encode(texts)
    assert num_cut == 0
    assert tokenizer.decode(ids) == [normalized(text) for text in texts]


def test_transformers_reads_the_file_and_gives_the_same_ids(tmp_path):
    ensure_torchvision()
    from transformers import PreTrainedTokenizerFast

    tokenizer = train()
    tokenizer.save_pretrained(tmp_path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ids, _ = tokenizer.encode(SOME)
    assert [[i for i in row if i != PADDING] for row in ids.tolist()] == [theirs(text)["input_ids"] for text in SOME]


def test_frequent_words_are_one_token_each():
    ids, _ = train().encode(["a three left of a seven", "seven a"])
    assert (ids[0] != PADDING).sum() == 6
    assert ids[1, :2].tolist() == ids[0, [5, 0]].tolist()  # the same token wherever the word stands


@given(st.permutations(SOME))
@settings(max_examples=10)
def test_the_order_of_captions_does_not_matter_and_training_is_deterministic(captions):
    assert train(captions).fingerprint == train().fingerprint


def test_the_vocabulary_is_as_large_as_asked_and_counts_every_byte():
    captions = ["".join(np.random.default_rng(i).choice(list("abcdefgh"), 20)) for i in range(50)]
    assert train(captions, vocab_size=300).vocab_size == 300
    assert train(captions, vocab_size=256).vocab_size == 256


def test_unseen_ids_are_those_of_no_training_caption():
    for tokenizer in (train(), train(max_length=2)):
        ids, _ = tokenizer.encode(SOME)
        assert set(range(tokenizer.vocab_size)) - set(tokenizer.unseen_ids) == set(ids.flatten().tolist()) - {PADDING}


def test_captions_are_padded_to_the_longest_or_cut_and_counted():
    assert train().max_length == 6
    assert train(others=["a three left of a seven left of a five"]).max_length == 10
    tokenizer = train(max_length=5)
    ids, num_cut = tokenizer.encode(["a three left of a seven", "a one", ""])
    whole, _ = train().encode(["a three left of a seven"])
    assert num_cut == 1
    assert ids.shape == (3, 5)
    assert ids.dtype == torch.int64
    assert ids[0].tolist() == whole[0, :5].tolist()
    assert ids[1, 2:].tolist() == [PADDING] * 3
    assert ids[2].tolist() == [PADDING] * 5


def test_prompts_are_encoded_as_captions_are():
    tokenizer = train()
    prompts = ["a three left of a seven", "  A Three\tleft of a   SEVEN \n", ""]
    ids, _ = tokenizer.encode(["a three left of a seven"] * 2 + [""])
    assert tokenizer.encode_prompts(prompts).equal(ids)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            "a tree left of a seven",
            "knows the word 'tree' of the prompt 'a tree left of a seven'; did you mean 'three'?",
        ),
        ("a three  Lefty of a seven", "knows the word 'Lefty'"),
        ("東京", "knows the word '東京'"),
        ("a one xyz", "(known: a, above, an, below, eight, five, left, of, one, seven, three)"),
        ("a one left of a five left of a one", "has 10 tokens, this prior's captions have at most 6; shorten it"),
        (7, "a prompt is a text that UTF-8 can hold, got 7"),
        (None, "a prompt is a text that UTF-8 can hold, got None"),
        ("a \ud800", "a prompt is a text that UTF-8 can hold, got 'a \\ud800'"),
    ],
)
def test_prompts_that_the_prior_cannot_know_are_refused(prompt, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared below)
        train().encode_prompts(["a one", prompt])
    assert message in str(error.value)


def test_a_text_tokenizer_is_the_same_after_saving_and_loading(tmp_path):
    tokenizer = train(max_length=4)
    for _ in range(2):  # replaces itself
        tokenizer.save_pretrained(tmp_path / "ä")
        loaded = TextTokenizer.load(tmp_path / "ä")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode(SOME)[0].equal(tokenizer.encode(SOME)[0])
    assert (loaded.max_length, loaded.unseen_ids) == (4, tokenizer.unseen_ids)
    others = [train(max_length=5), train(SOME[:-1], max_length=4), train([*SOME, "a tree"], max_length=4)]
    assert len({t.fingerprint for t in (tokenizer, *others)}) == 4


def edited(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), r"it has no tokenizer\.json"),
        (lambda f: (f / "config.json").unlink(), r"it has no config\.json"),
        (lambda f: edited(f / "tokenizer.json", model=None), "tokenizer.json: sha256 mismatch"),
        (lambda f: ((f / "manifest.json").unlink(), edited(f / "tokenizer.json", model=None)), "not the description"),
        (lambda f: ((f / "manifest.json").unlink(), edited(f / "config.json", max_length="3")), "integer 'max_length'"),
        (lambda f: ((f / "manifest.json").unlink(), edited(f / "config.json", unseen_ids=3)), "list 'unseen_ids'"),
        (lambda f: ((f / "manifest.json").unlink(), edited(f / "config.json", max_length=0)), "got .* and 0"),
        (lambda f: ((f / "manifest.json").unlink(), edited(f / "config.json", unseen_ids=[9999])), "unseen_ids must"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path, damage, message):
    train().save_pretrained(tmp_path / "text")
    damage(tmp_path / "text")
    with pytest.raises(ValueError, match=message):
        TextTokenizer.load(tmp_path / "text")


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds other files than a text tokenizer's \(model\.safetensors\)"):
        train().save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 255}, r"text\.vocab_size must lie in \[256, .*got 255"),
        ({"max_length": 0}, r"text\.max_length must lie in \[1, .*got 0"),
    ],
)
def test_text_configurations_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TextConfig(**options)


def test_captions_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match="all captions are empty"):
        train(["", "  "])
    for call in (lambda: train(["\ud800"]), lambda: train(others=["\ud800"]), lambda: train().encode(["\ud800"])):
        with pytest.raises(ValueError, match="a caption is a text that UTF-8 can hold"):
            call()


# On disk
# ------------------------------------------------------------------------------------------------


class FourCells(torch.nn.Module):
    """One code for each quarter of the image: how bright it is, in 5 steps."""

    spec = CodeSpec(((2, 2),), (5,))
    is_stochastic = False

    def encode(self, images, sample=False):
        return ((torch.nn.functional.adaptive_avg_pool2d(images, 2)[:, 0] * 12).long().clamp(max=4),)


def scenes(count=25, split="train", **options):
    return load_images(DataConfig(name="scenes", max_images=count, **options), split)


def dump(folder, dataset, **options):
    return write_codes(
        folder, FourCells(), dataset, split="train", tokenizer_folder=folder, fingerprint="f", part_size=10,
        progress=False, **options
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captions") / "codes"
    dump(folder, scenes())
    return folder


def test_row_i_has_the_caption_of_image_i(finished):
    store, images = CodeDataset(finished), scenes()
    assert store.captions == images.captions
    assert store.__getitems__([3, 7])["codes"][0].equal(FourCells().encode(images.__getitems__([3, 7])["image"])[0])
    assert "text" not in store[0]


def test_tokenized_captions_come_with_the_codes(finished):
    store = CodeDataset(finished)
    tokenizer = TextTokenizer.train(store.captions, TextConfig())
    assert store.tokenize_captions(tokenizer) == 0
    expected, _ = tokenizer.encode(store.captions)
    assert store[4]["text"].equal(expected[4])
    assert store[4]["text"].dtype == torch.int64
    assert store.collate([store[4], store[2]])["text"].equal(expected[[4, 2]])
    batches = list(DataLoader(store, batch_sampler=[[1, 2], [3]], collate_fn=store.collate, num_workers=1))
    assert batches[0]["text"].equal(expected[[1, 2]])
    assert pickle.loads(pickle.dumps(store)).captions == store.captions


def test_options_of_captions_are_refused_where_there_are_none(tmp_path):
    store = dump(tmp_path, load_images(DataConfig(max_images=25), "train"))
    with pytest.raises(ValueError, match=r"no captions, so TextConfig\(.*max_length=7\) would do nothing"):
        condition_on(store, store, "gpt", TextConfig(max_length=7), classes=False)
    for text in (TextConfig(), None):
        assert condition_on(store, store, "gpt", text, classes=False).implied == {}


def test_captions_of_any_characters_are_kept(tmp_path):
    images = scenes(3)
    images.captions = ['a "quoted"\nline', "東京 \u2028 \ud800", ""]
    assert dump(tmp_path / "codes", images).captions == images.captions


def test_damaged_and_missing_captions_are_named(finished, tmp_path):
    store = shutil.copytree(finished, tmp_path / "codes")
    path = store / "captions.jsonl"
    path.write_bytes(path.read_bytes().replace(b"a", b"b", 1))
    with pytest.raises(ValueError, match=r"captions\.jsonl: sha256 mismatch"):
        CodeDataset(store)
    path.write_text('"a one"\n')
    with pytest.raises(ValueError, match=r"captions\.jsonl must hold 25 captions"):
        CodeDataset(store, verify=False).captions  # noqa: B018
    path.unlink()
    with pytest.raises(ValueError, match=r"captions\.jsonl is missing"):
        CodeDataset(store)
    dump(store, scenes())
    assert CodeDataset(store).captions == scenes().captions


def test_captions_without_a_checksum_are_named(finished, tmp_path):
    store = shutil.copytree(finished, tmp_path / "codes")
    spec = json.loads((store / "spec.json").read_text())
    spec["files"]["captions.jsonl"] = None
    (store / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=r"spec\.json has no checksum of captions\.jsonl"):
        CodeDataset(store)


def test_a_store_of_other_captions_is_refused_and_replaced_only_if_asked(finished, tmp_path):
    store = shutil.copytree(finished, tmp_path / "codes")
    with pytest.raises(ValueError, match="already holds other codes"):
        dump(store, scenes(split_seed=1))
    digits = load_images(DataConfig(max_images=12, image_size=(16, 16)), "train")
    replaced = dump(store, digits, overwrite=True)
    assert replaced.captions is None
    assert not (store / "captions.jsonl").exists()
    with pytest.raises(ValueError, match="has no captions to condition a prior on"):
        replaced.tokenize_captions(train())


# Loss and reference values
# ------------------------------------------------------------------------------------------------


def test_the_unigram_table_is_that_of_its_definition(tmp_path):
    stores = [dump(tmp_path / split, scenes(60, split)) for split in ("train", "validation")]
    train_codes, validation_codes = (np.load(store.folder / "level0.npy").reshape(-1) for store in stores)
    p = [(np.sum(train_codes == k) + 1) / (len(train_codes) + 5) for k in range(5)]
    expected = -np.mean([np.log(p[k]) for k in validation_codes])
    assert unigram_nats_per_code(*stores) == pytest.approx(expected)
    assert 0 < expected < np.log(5)


class TwoLevels:
    """The least of a code store: a level whose code 2 never occurs, and one that is always 1."""

    spec = CodeSpec(((2,), (1,)), (3, 2))

    def __init__(self, *first):
        self.first = torch.tensor(first)

    def __len__(self):
        return len(self.first)

    def __getitems__(self, rows):
        return {"codes": (self.first[list(rows)], torch.ones(len(rows), 1, dtype=torch.int64))}


def test_levels_have_tables_of_their_own_and_no_code_is_impossible():
    nats = unigram_nats_per_code(TwoLevels([0, 0], [0, 1]), TwoLevels([2, 0]))
    # level 0: counts 3, 1, 0 and one more each, of 7; level 1: counts 0, 2, hence 1 and 3 of 4
    assert nats == pytest.approx(-(np.log(1 / 7) + np.log(4 / 7) + np.log(3 / 4)) / 3)


def test_validation_shows_uniform_and_unigram_beside_the_prior():
    prior = build()
    objective = PriorLoss(prior, unigram_nll=0.5).eval()
    codes = random_codes(4)
    values = objective({"codes": list(codes), "label": torch.zeros(4).long(), "text": CAPTIONS})
    nats = -prior.log_prob(codes, CAPTIONS)
    torch.testing.assert_close(values["nll"], nats / 6)
    torch.testing.assert_close(values["bits_per_image"], nats / np.log(2))
    bits_of_codes = 2 * np.log2(3) + 4
    expected = {
        "uniform_nll": bits_of_codes * np.log(2) / 6,
        "unigram_nll": 0.5,
        "uniform_bits_per_image": bits_of_codes,
        "unigram_bits_per_image": 3 / np.log(2),
    }
    assert objective.summary() == pytest.approx(expected)
    assert objective.train().summary() == {}
    assert "unigram_nll" not in PriorLoss(prior).eval().summary()


def test_densities_of_real_codes_have_no_bits_and_no_uniform_beside_them():
    config = PRIORS["gaussian_mixture"].Config(spec=tiny.REAL_SPECS["vector"])
    objective = PriorLoss(PRIORS["gaussian_mixture"](config)).eval()
    assert objective({"codes": [torch.zeros(2, 3)]})["nll"].tolist() == pytest.approx([np.log(2 * np.pi) / 2] * 2)
    assert objective.summary() == {}


# At the prompt
# ------------------------------------------------------------------------------------------------


def make(captions=SOME, **options) -> Pipeline:
    tokenizer = build_tokenizer({"type": "vqvae", **tiny.TOKENIZERS["vqvae"]})
    text_tokenizer = train(captions)
    prior = build_prior({
        "type": "gpt",
        "spec": tokenizer.spec,
        "tokenizer_fingerprint": fingerprint(tokenizer),
        "text_vocab_size": text_tokenizer.vocab_size,
        "max_text_length": text_tokenizer.max_length,
        "text_tokenizer_fingerprint": text_tokenizer.fingerprint,
        **tiny.PRIORS["gpt"],
        **options,
    })  # fmt: skip
    with torch.no_grad():
        for parameter in prior.parameters():  # decided enough for the samples to depend on every weight
            parameter += 0.3 * torch.randn_like(parameter)
    pipeline = Pipeline(tokenizer, prior, text_tokenizer=text_tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, *arguments, **options):
    (codes,) = pipeline.sample(
        *arguments, generator=torch.Generator().manual_seed(0), output_type="codes", **options
    )  # fmt: skip
    return codes


def test_it_samples_the_same_after_saving_and_loading(tmp_path):
    pipeline = make()
    pipeline.save_pretrained(tmp_path)
    loaded = Pipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    for options in ({}, {"guidance_scale": 2.0}, {"batch_size": 2}):
        assert draw(loaded, prompts=SOME, **options).equal(draw(pipeline, prompts=SOME, **options))
    card = (tmp_path / "README.md").read_text()
    assert "conditional on captions of up to 6 tokens" in card
    assert "pipeline_tag: text-to-image" in card
    assert json.loads((tmp_path / "model_index.json").read_text())["text_tokenizer"] == [
        "text_tokenizer",
        "TextTokenizer",
    ]


def test_one_prompt_is_for_all_images_and_none_is_the_empty_one():
    pipeline = make()
    assert draw(pipeline, 16, prompts="a one").equal(draw(pipeline, prompts=["a one"] * 16))
    assert draw(pipeline, 16).equal(draw(pipeline, 16, prompts=""))
    assert draw(pipeline, 16, prompts="a one").equal(draw(pipeline, 16, prompts=" A  ONE "))
    assert not draw(pipeline, 16, prompts="a one").equal(draw(pipeline, 16))
    assert not draw(pipeline, 16, prompts="a one", guidance_scale=5.0).equal(draw(pipeline, 16, prompts="a one"))
    assert draw(pipeline, 16, prompts="a one", guidance_scale=0.0).equal(draw(pipeline, 16))
    assert len(pipeline.sample(prompts="a one")) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": ["a one"], "num_images": 2}, "got 1 prompts for 2 images: give one, or one each"),
        ({"class_labels": [3]}, "conditional on captions: give prompts, not class_labels"),
        ({"prompts": "a cat"}, "knows the word 'cat'"),
        ({"prompts": [3]}, "a prompt is a text that UTF-8 can hold, got 3"),
    ],
)
def test_requests_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make().sample(**arguments)


@pytest.mark.parametrize(("num_classes", "message"), [(0, "this one is unconditional"), (2, "give class_labels")])
def test_prompts_are_refused_by_priors_without_captions(num_classes, message):
    tokenizer = build_tokenizer({"type": "vqvae", **tiny.TOKENIZERS["vqvae"]})
    implied = {"spec": tokenizer.spec, "num_classes": num_classes, "tokenizer_fingerprint": fingerprint(tokenizer)}
    prior = build_prior({"type": "gpt", **tiny.PRIORS["gpt"], **implied})
    with pytest.raises(ValueError, match=message):
        Pipeline(tokenizer, prior).sample(prompts=["a one"])
    with pytest.raises(ValueError, match="no use for a text tokenizer"):
        Pipeline(tokenizer, prior, text_tokenizer=train())


def test_a_prior_that_always_had_captions_needs_a_prompt_for_each_image():
    pipeline = make(class_dropout=0.0)
    assert len(draw(pipeline, prompts=["a one"])) == 1
    for prompts in (None, "", ["a one", " "]):
        with pytest.raises(ValueError, match=r"without class dropout .* give a prompt for each image"):
            pipeline.sample(2, prompts=prompts)


def test_a_text_tokenizer_that_is_another_or_missing_is_refused(tmp_path):
    pipeline, other = make(), train([*SOME, *["a two above a four"] * 2])
    with pytest.raises(ValueError, match="trained on captions of text tokenizer") as error:
        Pipeline(pipeline.tokenizer, pipeline.prior, text_tokenizer=other)
    assert other.fingerprint in str(error.value)
    assert pipeline.text_tokenizer.fingerprint in str(error.value)
    with pytest.raises(ValueError, match="give their text tokenizer"):
        Pipeline(pipeline.tokenizer, pipeline.prior)
    pipeline.save_pretrained(tmp_path)
    assert Pipeline.from_pretrained(tmp_path, text_tokenizer=pipeline.text_tokenizer).text_tokenizer is not None
    shutil.rmtree(tmp_path / "text_tokenizer")
    with pytest.raises(ValueError, match=r"text_tokenizer is not a text tokenizer: it has no tokenizer\.json"):
        Pipeline.from_pretrained(tmp_path)


def test_pictures_have_a_column_for_each_caption(tmp_path):
    pipeline = make()
    captions, _ = pipeline.text_tokenizer.encode(SOME[:3])
    seen = {}

    class Watched(type(pipeline.tokenizer)):
        def decode(self, codes, generator=None):
            seen["codes"] = codes[0]
            return super().decode(codes, generator)

    pipeline.tokenizer.__class__ = Watched
    save_samples(pipeline.prior, pipeline.tokenizer, tmp_path / "s.png", captions=captions, rows=2)
    generator = torch.Generator().manual_seed(0)
    assert seen["codes"].equal(pipeline.prior.sample(6, captions.repeat(2, 1), generator=generator)[0])
    assert isinstance(pipeline.tokenizer, Tokenizer)


def test_the_scripts_train_on_captions_and_draw_prompts(tmp_path):
    options = [*TINY_TOKENIZER, *SHORT, "--data.name", "scenes", "--tokenizer.downsample_factor", "4"]
    printed = launch(tmp_path, "train_tokenizer", *options, "--output", "runs/my scenes").stdout
    assert "scripts/train_prior.py --run 'runs/my scenes'" in printed
    printed = launch(tmp_path, "train_prior", *TINY_PRIOR, *SHORT).stdout
    assert "columns of pictures: a" in printed
    assert "unigram_nll" in printed
    folder = tmp_path / "runs" / "my scenes"
    pipeline = Pipeline.from_pretrained(folder)
    assert pipeline.prior.conditional_on_text
    assert pipeline.metrics["validation prior nll"] < 1.05 * pipeline.metrics["validation prior uniform_nll"]
    again = launch(tmp_path, "train_prior", *TINY_PRIOR, *SHORT)  # finished: the same captions are the same run
    assert "continuing from step 4" in again.stdout
    arguments = ["--prompts", "a three left of a seven", "--num_images", "2", "--guidance_scale", "2"]
    done = run(tmp_path, "sample", *arguments, "--output", "p.png")
    assert done.returncode == 0, done.stderr[-3000:]
    done = run(tmp_path, "sample", "--prompts", '["a three", "a cat"]')
    assert done.returncode == 1
    assert "knows the word 'cat'" in done.stderr
    prior = ["--prior.type", "pixelcnn", "--output", "other", *SHORT]
    refused = run(tmp_path, "train_prior", *prior)
    assert "add --text_conditional false, or take gpt" in refused.stderr
    assert "token ids" not in refused.stdout  # before the text tokenizer is trained
    launch(tmp_path, "train_prior", *prior, "--prior.hidden_dim", "8", "--text_conditional", "false")
    assert Pipeline.from_pretrained(tmp_path / "other").prior.num_classes == 0


def test_save_stage_two_enters_the_text_tokenizer(tmp_path):
    pipeline = make()
    pipeline.save_pretrained(tmp_path)
    save_stage_two(tmp_path, pipeline.tokenizer, pipeline.prior, [], {"nll": 1.0}, pipeline.text_tokenizer)
    assert Pipeline.from_pretrained(tmp_path).metrics == {"validation prior nll": 1.0}


def test_what_is_saved_is_json_and_safetensors_alone(tmp_path):
    make().save_pretrained(tmp_path)
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors", ".md"}
