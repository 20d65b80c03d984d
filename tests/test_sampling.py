"""Filtering and drawing against plain NumPy; noise that belongs to each image."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prior import sampling
from prior.sampling import ImageNoise, SamplingOptions, filter_logits, final_logits, guide, log_prob_of
from prior.torchvision_guard import ensure_torchvision

rows = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12)


def kept_by_hand(probabilities, top_k, top_p, min_p):
    """Indices that temperature-free top-k, top-p, then min-p keep, one at a time from the most probable down."""
    order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])
    if top_k is not None:
        order = order[:top_k]
    total, kept = sum(probabilities[i] for i in order), []
    for i in order:
        if top_p is not None and sum(probabilities[j] for j in kept) / total >= top_p:
            break
        kept.append(i)
    return {i for i in kept if probabilities[i] >= (min_p or 0) * max(probabilities)}


FILTERS = [
    *((None, None, None), (3, None, None), (100, None, None), (None, 0.6, None), (4, 0.83, None), (1, 0.01, None)),
    *((None, None, 0.4), (None, None, 1.0), (5, None, 0.1), (None, 0.9, 0.2), (6, 0.9, 0.15)),
]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), FILTERS)
def test_filtered_logits_match_a_filter_by_hand(temperature, top_k, top_p, min_p):
    logits = torch.randn(50, 9)
    filtered = filter_logits(logits, SamplingOptions(temperature, top_k, top_p, min_p))
    for row, result in zip(logits.double().numpy(), filtered.softmax(-1).double().numpy()):
        expected = np.exp(row / temperature)
        kept = kept_by_hand(expected / expected.sum(), top_k, top_p, min_p)
        expected[[i for i in range(len(row)) if i not in kept]] = 0
        np.testing.assert_allclose(result, expected / expected.sum(), atol=1e-6)  # float32 exponentials


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), FILTERS)
def test_filtered_logits_are_those_of_transformers(temperature, top_k, top_p, min_p):
    ensure_torchvision()
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    options = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0, "top_p": top_p, "min_p": min_p}
    sizes = {"vocab_size": 4, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1))
    # the model's own list, so that the order of the filters is compared too
    warpers = model._get_logits_processor(GenerationConfig(**options), input_ids_seq_length=1)
    logits = torch.randn(200, 64)
    theirs = warpers(torch.zeros(200, 1, dtype=torch.int64), logits.clone())
    ours = filter_logits(logits, SamplingOptions(temperature, top_k, top_p, min_p))
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1))
    assert ours.isfinite().equal(theirs.isfinite())


@given(
    rows,
    st.integers(1, 20),
    st.floats(1e-6, 1.0),
    st.floats(0.0, 1.0),
    st.sampled_from([0.0, 1e-45, 1e-30, 1e-3, 1.0, 1e30]),
)
def test_at_least_one_code_is_kept_whatever_the_options(row, top_k, top_p, min_p, temperature):
    filtered = filter_logits(torch.tensor([row]), SamplingOptions(temperature, top_k, top_p, min_p))
    assert filtered.isfinite().any()
    assert not filtered.isnan().any()


def test_temperature_zero_keeps_the_first_of_the_most_probable():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    assert filter_logits(logits, SamplingOptions(temperature=0.0)).tolist() == [[-torch.inf, 0, -torch.inf, -torch.inf]]


def test_ties_at_the_k_th_code_are_kept():
    filtered = filter_logits(torch.tensor([[1.0, 2.0, 2.0, 2.0]]), SamplingOptions(top_k=2))
    assert filtered.isfinite().tolist() == [[False, True, True, True]]


@pytest.mark.parametrize("top_k", [None, 2, 4])
def test_ties_at_the_edge_of_the_nucleus_are_kept(top_k):
    logits = torch.tensor([[0.1, 0.2, 0.5, 0.2]]).log()
    filtered = filter_logits(logits, SamplingOptions(top_k=top_k, top_p=0.6))
    assert filtered.isfinite().tolist() == [[False, True, True, True]]


def test_half_precision_logits_are_filtered_in_float32():
    assert filter_logits(torch.randn(2, 4, dtype=torch.bfloat16), SamplingOptions(top_p=0.5)).dtype == torch.float32


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_guidance_multiplies_powers_of_the_two_distributions(scale):
    conditional, unconditional = torch.randn(2, 5, 4).double()
    p, q = conditional.softmax(-1), unconditional.softmax(-1)
    expected = p**scale * q ** (1 - scale)
    guided = guide(conditional, unconditional, scale).softmax(-1)
    torch.testing.assert_close(guided.double(), expected / expected.sum(-1, keepdim=True), atol=1e-6, rtol=1e-5)


def draw(logits, uniform):
    """By a search, and by the comparison of devices whose sums cannot be searched; both give the same codes."""
    codes, _ = sampling.draw(logits, uniform)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "SUMS_IN_ORDER", ())
        assert torch.equal(sampling.draw(logits, uniform)[0], codes)
    return codes


@given(rows, st.floats(0, 1, width=32, exclude_max=True))
def test_drawing_inverts_the_cumulative_distribution(row, uniform):
    probabilities = np.exp(np.float64(row) - max(row))
    bounds = np.concatenate([[0.0], (probabilities / probabilities.sum()).cumsum()])
    logits = torch.tensor([row])
    code = draw(logits, torch.tensor([uniform]))
    log_prob = log_prob_of(code, logits)
    assert bounds[code] - 1e-6 <= uniform <= bounds[code + 1] + 1e-6  # rounding of float32 sums
    assert log_prob.item() == pytest.approx(np.log(bounds[code + 1] - bounds[code]), abs=1e-4, rel=1e-3)


@pytest.mark.parametrize("uniform", [0.0, 2**-30, 0.5, 1 - 2**-24])
@pytest.mark.parametrize("vocab_size", [3, 1000, 16384])
def test_an_impossible_code_is_never_drawn(uniform, vocab_size):
    logits = torch.randn(64, vocab_size)
    logits[:, 0] = logits[:, -1] = -torch.inf
    logits[torch.rand(64, vocab_size) < 0.3] = -torch.inf
    logits[:, 1] = 0.0
    codes = draw(logits, torch.full((64,), uniform))
    assert log_prob_of(codes, logits).isfinite().all()
    assert logits.gather(1, codes[:, None]).isfinite().all()


def test_the_only_possible_code_is_always_drawn():
    logits = torch.full((4, 6), -torch.inf)
    logits[:, 4] = -3.0
    codes = draw(logits, torch.tensor([0.0, 0.3, 0.999, 1 - 2**-24]))
    assert codes.tolist() == [4] * 4
    assert log_prob_of(codes, logits).tolist() == [0.0] * 4


def test_frequencies_of_drawn_codes_match_the_probabilities():
    logits, n = torch.tensor([0.0, 2.0, -1.0, -torch.inf, 1.0]), 40_000
    counts = draw(logits.expand(n, -1), torch.rand(n)).bincount(minlength=5)
    p = logits.softmax(0)
    assert ((counts / n - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()  # five standard deviations


@pytest.mark.parametrize("devices_of_sums_in_order", [("cpu",), ()])
def test_totals_tell_of_what_is_no_number_and_keep_no_probabilities(devices_of_sums_in_order, monkeypatch):
    monkeypatch.setattr(sampling, "SUMS_IN_ORDER", devices_of_sums_in_order)
    logits = torch.randn(3, 1000)
    _, total = sampling.draw(logits, torch.rand(3))
    sampling.check_totals([total])
    assert total.untyped_storage().nbytes() == 3 * 4
    logits[1, 7] = torch.nan
    codes, damaged = sampling.draw(logits, torch.rand(3))
    assert (codes < 1000).all()  # else the next step would fall over it
    with pytest.raises(ValueError, match="not numbers"):
        sampling.check_totals([total, damaged])


def test_guidance_takes_the_conditional_half_first():
    conditional, unconditional = torch.tensor([[5.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    logits = final_logits(torch.cat([conditional, unconditional]), SamplingOptions(guidance_scale=2.0), 0, 1)
    torch.testing.assert_close(logits.softmax(-1), torch.tensor([[10.0, -5.0]]).softmax(-1))


@pytest.mark.parametrize(
    ("schedule", "scales"),
    [
        ("constant", [3, 3, 3, 3, 3]),
        ("linear", [1, 1.5, 2, 2.5, 3]),
        ((0, 1), [3, 3, 3, 3, 3]),
        ([0.2, 0.6], [1, 3, 3, 1, 1]),  # a list, as YAML has it
        ((0.3, 0.5), [1, 1, 3, 1, 1]),
        ((0.5, 0.55), [1, 1, 1, 1, 1]),
    ],
)
def test_the_scale_follows_the_schedule_over_the_sequence(schedule, scales):
    options = SamplingOptions(guidance_scale=3.0, guidance_schedule=schedule)
    assert options.guided
    assert [options.guidance_at(i, 5) for i in range(5)] == scales
    conditional, unconditional = torch.randn(2, 2, 4)
    for i, scale in enumerate(scales):
        expected = filter_logits(guide(conditional, unconditional, scale), SamplingOptions())
        torch.testing.assert_close(final_logits(torch.cat([conditional, unconditional]), options, i, 5), expected)


def test_a_linear_schedule_over_a_single_code_has_the_full_scale():
    assert SamplingOptions(guidance_scale=3.0, guidance_schedule="linear").guidance_at(0, 1) == 3


def test_noise_of_an_image_does_not_depend_on_the_batch():
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4, 5)]
    together = ImageNoise(3, generators, torch.device("cpu")).uniform(7)
    alone = ImageNoise(1, [torch.Generator().manual_seed(4)], torch.device("cpu")).uniform(7)
    assert together[1].equal(alone[0])


@pytest.mark.parametrize("num_images", [1, 5, 40])
def test_one_generator_gives_the_first_images_of_any_larger_batch(num_images):
    few = ImageNoise(num_images, torch.Generator().manual_seed(0), torch.device("cpu")).uniform(3)
    many = ImageNoise(64, torch.Generator().manual_seed(0), torch.device("cpu")).uniform(3)
    assert few.equal(many[:num_images])


def test_a_wrong_number_of_generators_is_refused():
    with pytest.raises(ValueError, match="got 2 generators for 3 images"):
        ImageNoise(3, [torch.Generator(), torch.Generator()], torch.device("cpu"))


@pytest.mark.parametrize(
    ("option", "value", "limit"),
    [
        ("temperature", -1.0, "at least 0, got -1.0"),
        ("temperature", float("nan"), "at least 0, got nan"),
        ("temperature", float("inf"), "finite and at least 0, got inf"),
        ("temperature", "1", "finite and at least 0, got '1'"),
        ("temperature", None, "got None"),
        ("top_k", "5", "got '5'"),
        ("top_p", "0.9", "got '0.9'"),
        ("min_p", [0.1], r"got \[0.1\]"),
        ("guidance_scale", "2", "got '2'"),
        ("top_k", 0, "at least 1, or None to keep every code, got 0"),
        ("top_k", 1.5, "got 1.5"),
        ("top_p", 0.0, r"\(0, 1\], or be None to keep every code, got 0.0"),
        ("top_p", 1.1, "got 1.1"),
        ("min_p", -0.1, r"lie in \[0, 1\], or be None to keep every code, got -0.1"),
        ("min_p", 1.1, "got 1.1"),
        ("guidance_scale", -0.5, "at least 0, got -0.5"),
        ("guidance_schedule", "cosine", r"'constant', 'linear', or an interval \(start, end\) .*, got 'cosine'"),
        ("guidance_schedule", (0.5, 0.5), r"0 <= start < end <= 1, got \(0.5, 0.5\)"),
        ("guidance_schedule", (-0.1, 0.5), r"got \(-0.1, 0.5\)"),
        ("guidance_schedule", (0.1, 1.5), r"got \(0.1, 1.5\)"),
        ("guidance_schedule", (0.1, 0.2, 0.3), r"got \(0.1, 0.2, 0.3\)"),
        ("guidance_schedule", ("a", "b"), r"got \('a', 'b'\)"),
        ("guidance_schedule", None, "got None"),
    ],
)
def test_options_out_of_range_are_refused(option, value, limit):
    with pytest.raises(ValueError, match=f"{option} must .*{limit}"):
        SamplingOptions(**{option: value})


@pytest.mark.parametrize("kind", [float, np.float32, torch.tensor])
def test_numbers_of_every_library_are_options(kind):
    options = SamplingOptions(*map(kind, [0.5]), top_p=kind(0.9), min_p=kind(0.1), guidance_scale=kind(2.0))
    logits = torch.randn(4, 5)
    expected = filter_logits(logits, SamplingOptions(0.5, top_p=0.9, min_p=0.1))
    torch.testing.assert_close(filter_logits(logits, options), expected)


@pytest.mark.parametrize(
    "options", [{"top_p": 1.0}, {"min_p": 0}, {"guidance_scale": 1, "guidance_schedule": "linear"}]
)
def test_what_changes_nothing_is_no_option(options):
    assert SamplingOptions(**options).names_set() == set()
