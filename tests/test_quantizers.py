"""Laws of every quantizer, and independent checks of the search, the averages, and dead-code revival."""

import copy
import math
import re
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from benchmarks.measure import peak_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import tiny
from tests.allocation import training_pass
from tokenizer.quantizers import EMAVQ, FSQ, LFQ, QUANTIZERS, VQ, Gumbel, Residual, ema_vq, lfq
from tokenizer.quantizers import nearest as search
from tokenizer.quantizers.base import straight_through
from tokenizer.quantizers.codebook import initial_codebook
from tokenizer.quantizers.nearest import nearest
from tokenizer.registry import build


@pytest.fixture(params=sorted(QUANTIZERS))
def quantizer(request):
    if request.param not in tiny.QUANTIZERS:
        pytest.fail(f"no tiny configuration of quantizer '{request.param}' in tests/tiny.py")
    return build("quantizer", QUANTIZERS, {"type": request.param, **tiny.QUANTIZERS[request.param]})


def features(quantizer, batch: int = 3, seed: int = 0, height: int = 6, width: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, quantizer.in_channels, height, width, generator=generator)


def train_step(quantizer, *batches: Tensor) -> None:
    for h in batches:
        quantizer(h)
    quantizer.after_step()


# Laws over the registry


def test_codes_are_int64_in_range_and_z_has_the_promised_shape(quantizer):
    out = quantizer(features(quantizer))
    assert out.z.shape == (3, quantizer.out_channels, 6, 2)
    assert len(out.codes) == len(quantizer.vocab_sizes)
    for codes, vocab_size in zip(out.codes, quantizer.vocab_sizes):
        assert codes.shape == (3, 6, 2)
        assert codes.dtype == torch.int64
        assert 0 <= codes.min() <= codes.max() < vocab_size


def test_embedding_the_codes_gives_z_bit_for_bit(quantizer):
    train_step(quantizer, features(quantizer))
    h = features(quantizer, seed=1)
    out = quantizer.eval()(h)
    assert torch.equal(quantizer.embed(out.codes), out.z)
    assert all(torch.equal(a, b) for a, b in zip(quantizer.encode(h), out.codes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_every_dtype_serves_for_training(quantizer, dtype):
    quantizer.train().to(dtype)
    for seed in range(3):
        h = features(quantizer, seed=seed).to(dtype).requires_grad_()
        out = quantizer(h, step=0)
        sum(out.losses.values(), out.z.sum()).backward()
        quantizer.after_step()
    assert out.z.dtype == h.grad.dtype == dtype
    assert h.grad.isfinite().all()
    assert all(buffer.dtype == dtype for buffer in quantizer.buffers() if buffer.is_floating_point())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_dtype_serves_for_evaluation(quantizer, dtype):
    train_step(quantizer, features(quantizer))
    quantizer.eval().to(dtype)
    h = features(quantizer, seed=1).to(dtype)
    out = quantizer(h)
    assert out.z.dtype == dtype
    assert torch.equal(quantizer.embed(out.codes).to(dtype), out.z)
    assert all(torch.equal(a, b) for a, b in zip(quantizer.encode(h), out.codes))


def test_evaluation_is_deterministic_and_changes_nothing(quantizer):
    train_step(quantizer, features(quantizer))
    state = copy.deepcopy(quantizer.eval().state_dict())
    first, second = quantizer(features(quantizer)), quantizer(features(quantizer))
    quantizer.after_step()
    assert torch.equal(first.z, second.z)
    assert all(torch.equal(value, state[name]) for name, value in quantizer.state_dict().items())


@pytest.mark.parametrize("step", [0, None])
def test_gradient_reaches_the_input_through_z(quantizer, step):
    h = features(quantizer).requires_grad_()
    out = quantizer(h, step=step)
    out.z.square().sum().backward()
    assert h.grad.abs().sum() > 0


def test_losses_are_finite_scalars(quantizer):
    losses = quantizer(features(quantizer), step=0).losses
    assert all(loss.shape == () and loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())


def test_codes_inside_bfloat16_autocast_are_those_of_float32(quantizer):
    train_step(quantizer, features(quantizer))
    # Many positions: were the distances in bfloat16, some would change sides.
    h = features(quantizer, batch=64, seed=1).bfloat16()
    expected = quantizer.eval()(h.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = quantizer(h)
    assert all(torch.equal(a, b) for a, b in zip(out.codes, expected.codes))
    assert out.z.dtype == torch.bfloat16
    assert torch.equal(out.z, expected.z.bfloat16())


def test_state_dict_restores_the_codes(quantizer):
    train_step(quantizer, features(quantizer))
    twin = copy.deepcopy(quantizer)
    train_step(twin, features(quantizer, seed=1))
    twin.load_state_dict(quantizer.state_dict())
    h = features(quantizer, seed=2)
    assert torch.equal(twin.eval()(h).z, quantizer.eval()(h).z)


@pytest.mark.parametrize("training", [True, False])
def test_features_of_another_shape_raise_and_leave_no_trace(quantizer, training):
    channels = quantizer.in_channels
    twin = copy.deepcopy(quantizer)
    quantizer.train(training)
    for shape in [(3, 12, channels), (channels, 6, 2), (3, channels + 1, 6, 2), (3, channels, 0, 2)]:
        for use in (quantizer, quantizer.encode, quantizer.draw):
            with pytest.raises(ValueError, match=rf"\(B, {channels}, h, w\).*got {re.escape(str(shape))}"):
                use(torch.zeros(shape))
    train_step(quantizer.train(), features(quantizer))
    train_step(twin, features(quantizer))
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in quantizer.state_dict().items())


def test_a_batch_of_no_images_has_nothing_to_train_on(quantizer):
    empty = torch.zeros(0, quantizer.in_channels, 6, 2)
    with pytest.raises(ValueError, match="cannot train on a batch of no images"):
        quantizer.train()(empty)
    assert all(len(code) == 0 for code in quantizer.eval().encode(empty))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_evaluating_features_that_are_not_finite_raises(quantizer, value):
    h = features(quantizer)
    h[1, 0, 2, 1] = value
    with pytest.raises(ValueError, match="not finite"):
        quantizer.eval()(h)


def test_batch_of_one_position(quantizer):
    train_step(quantizer, features(quantizer, batch=1, height=1, width=1))
    assert quantizer.eval()(features(quantizer, batch=1, height=1, width=1)).z.isfinite().all()


# Nearest neighbours


def brute_force(vectors: Tensor, codebook: Tensor) -> Tensor:
    differences = vectors.double()[:, None] - codebook.double()[None]
    return torch.from_numpy(differences.square().sum(dim=2).numpy().argmin(axis=1))


@settings(max_examples=100)
@given(
    num_vectors=st.integers(0, 40),
    codebook_size=st.integers(1, 9),
    dim=st.integers(1, 4),
    tile=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 2**32 - 1),
)
def test_nearest_is_brute_force_with_ties_to_the_lowest_index(num_vectors, codebook_size, dim, tile, seed):
    generator = torch.Generator().manual_seed(seed)
    # Small whole numbers are exact in float32 and tie often; small tiles put edges everywhere.
    vectors = torch.randint(-2, 3, (num_vectors, dim), generator=generator).float()
    codebook = torch.randint(-2, 3, (codebook_size, dim), generator=generator).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "CPU_TILE", tile[0] * tile[1])
        patch.setattr(search, "CPU_COLUMNS", tile[1])
        codes = nearest(vectors, codebook)
    assert torch.equal(codes, brute_force(vectors, codebook))


def test_the_search_of_other_devices_finds_what_that_of_a_cpu_finds():
    vectors, codebook = torch.randn(50, 5), torch.randn(40, 5)
    elsewhere = search.Search(codebook)
    elsewhere.on_cpu, elsewhere.rows = False, 16
    assert elsewhere(vectors).equal(search.nearest(vectors, codebook))
    assert elsewhere(vectors).equal(torch.cdist(vectors.double(), codebook.double()).argmin(dim=1))


ROWS = search.CPU_TILE // search.CPU_COLUMNS


@pytest.mark.parametrize("num_vectors", [1, ROWS - 1, ROWS, ROWS + 1])
@pytest.mark.parametrize("codebook_size", [search.CPU_COLUMNS, 2 * search.CPU_COLUMNS + 1])
def test_nearest_is_brute_force_around_the_edges_of_a_tile(num_vectors, codebook_size):
    codebook = torch.randn(codebook_size, 2)
    vectors = torch.randn(num_vectors, 2)
    chosen = (vectors.double() - codebook[nearest(vectors, codebook)].double()).norm(dim=1)
    best = torch.cdist(vectors.double(), codebook.double()).amin(dim=1)
    torch.testing.assert_close(chosen, best, rtol=0, atol=1e-4)  # float32: two entries may be as good as equally near


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_nearest_works_whatever_the_gradient_mode(mode):
    vectors, codebook = torch.randn(10, 3), torch.randn(4, 3, requires_grad=True)
    with mode():
        codes = nearest(vectors, codebook)
    assert torch.equal(codes, brute_force(vectors, codebook.detach()))


def test_nearest_does_without_triton_or_a_compiler_for_it(monkeypatch):
    monkeypatch.setattr(search, "FUSED_DEVICE", "cpu")
    monkeypatch.setattr(search, "HAS_KERNELS", False)
    # an import would fail
    monkeypatch.setitem(sys.modules, "tokenizer.quantizers.nearest_triton", None)
    vectors, codebook = torch.randn(10, 3), torch.randn(4, 3)
    assert torch.equal(nearest(vectors, codebook), brute_force(vectors, codebook))


def test_peak_memory_of_a_training_pass_is_far_below_the_matrix_of_distances():
    num_vectors, codebook_size, code_dim = 16384, 8192, 64
    small = (256, codebook_size, code_dim)
    peak = peak_memory(training_pass, (num_vectors, codebook_size, code_dim), small, limit_gb=4.0)
    vectors, matrix = num_vectors * code_dim * 4, num_vectors * codebook_size * 4
    assert vectors < peak < matrix / 8


# Vector quantization


def test_straight_through_is_exact_forward_and_identity_backward():
    vectors, entries = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    weights = torch.randn(4, 3)
    out = straight_through(vectors, entries)
    (out * weights).sum().backward()
    assert torch.equal(out, entries)
    assert torch.equal(vectors.grad, weights)
    assert entries.grad is None


def test_codebook_loss_moves_the_codebook_and_commitment_the_encoder():
    quantizer = VQ(codebook_size=5, code_dim=4, commitment_weight=0.5, init="normal")
    h = features(quantizer).requires_grad_()
    losses = quantizer(h).losses
    distance = (h - quantizer.embed(quantizer(h).codes)).square().mean()
    assert losses["codebook"].item() == pytest.approx(distance.item(), rel=1e-6)
    assert losses["commitment"].item() == pytest.approx(0.5 * distance.item(), rel=1e-6)
    assert torch.autograd.grad(losses["codebook"], h, retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(losses["commitment"], quantizer.codebook, allow_unused=True) == (None,)


def test_the_gradients_of_both_losses_are_those_of_the_squared_distance():
    quantizer = VQ(codebook_size=5, code_dim=4, commitment_weight=0.5, init="normal")
    h = features(quantizer, height=3).requires_grad_()  # no side has the length of another
    out = quantizer(h)
    (2 * out.losses["codebook"] + out.losses["commitment"]).backward()
    codebook, vectors = (x.detach().clone().requires_grad_() for x in (quantizer.codebook, h))
    distance = (vectors.permute(0, 2, 3, 1) - codebook[out.codes[0]]).square().mean()
    of_codebook, of_vectors = torch.autograd.grad(distance, (codebook, vectors))
    torch.testing.assert_close(quantizer.codebook.grad, 2 * of_codebook)
    torch.testing.assert_close(h.grad, 0.5 * of_vectors)


def numpy_ema(codebook, batches, decay, epsilon):
    """The recursion of appendix A.1, written out entry by entry in float64."""
    codebook = codebook.astype(np.float64)
    num_codes = len(codebook)
    share = len(batches[0]) / num_codes
    size, total = np.full(num_codes, share), codebook * share
    for x in batches:
        codes = ((x[:, None] - codebook[None]) ** 2).sum(2).argmin(1)
        for i in range(num_codes):
            size[i] = decay * size[i] + (1 - decay) * (codes == i).sum()
            total[i] = decay * total[i] + (1 - decay) * x[codes == i].sum(0)
        n = size.sum()
        smoothed = (size + epsilon) / (n + num_codes * epsilon) * n
        codebook = total / smoothed[:, None]
    return codebook, size


def test_moving_averages_follow_the_recursion_of_the_paper():
    quantizer = EMAVQ(codebook_size=5, code_dim=4, decay=0.8, epsilon=0.1, init="normal", revive_below=0)
    start = quantizer.codebook.numpy().copy()
    batches = [features(quantizer, batch=8, seed=seed) for seed in range(6)]
    for h in batches:
        train_step(quantizer, h)
    rows = [h.permute(0, 2, 3, 1).reshape(-1, 4).double().numpy() for h in batches]
    codebook, size = numpy_ema(start, rows, decay=0.8, epsilon=0.1)
    np.testing.assert_allclose(quantizer.codebook.numpy(), codebook, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(quantizer.cluster_size.numpy(), size, rtol=1e-5)


def test_codes_and_averages_agree_with_vector_quantize_pytorch():
    vector_quantize_pytorch = pytest.importorskip("vector_quantize_pytorch")
    quantizer = EMAVQ(codebook_size=16, code_dim=4, decay=0.9, init="normal", revive_below=0)
    peer = vector_quantize_pytorch.VectorQuantize(dim=4, codebook_size=16, decay=0.9, eps=1e-5, kmeans_init=False)
    share = 8 * 6 * 2 / 16
    peer._codebook.embed.data.copy_(quantizer.codebook[None])
    peer._codebook.embed_avg.data.copy_(quantizer.codebook[None] * share)
    peer._codebook.cluster_size.data.fill_(share)
    for seed in range(4):
        h = features(quantizer, batch=8, seed=seed)
        _, peer_codes, _ = peer(h.permute(0, 2, 3, 1).reshape(8, -1, 4))
        assert torch.equal(quantizer(h).codes[0].flatten(1), peer_codes)
        quantizer.after_step()
        torch.testing.assert_close(quantizer.codebook, peer._codebook.embed[0], rtol=1e-5, atol=1e-6)


def test_codebook_moves_only_after_the_step_and_only_when_training():
    quantizer = EMAVQ(codebook_size=5, code_dim=4, init="normal")
    start = quantizer.codebook.clone()
    quantizer(features(quantizer))
    assert torch.equal(quantizer.codebook, start)
    quantizer.after_step()
    moved = quantizer.codebook.clone()
    assert not torch.equal(moved, start)
    quantizer.after_step()  # nothing was gathered since
    with torch.no_grad():
        quantizer(features(quantizer))
    quantizer.after_step()
    assert torch.equal(quantizer.codebook, moved)


@pytest.mark.parametrize("make", [EMAVQ, partial(Residual, depth=2, shared_codebook=True)])
def test_two_accumulated_batches_are_one_of_twice_the_size(make):
    whole = make(codebook_size=16, code_dim=4, decay=0.5, revive_below=0.5)  # some entries are replaced each step
    with torch.no_grad():
        whole(features(whole))  # initialised from the same data
    parts = copy.deepcopy(whole)
    for seed in range(8):
        h = 10 * features(whole, batch=8, seed=seed)
        train_step(whole, h)
        train_step(parts, h[:4], h[4:])
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_a_codebook_that_nobody_moves_is_reported(monkeypatch):
    monkeypatch.setattr(ema_vq, "MOST_CANDIDATES", 6)
    quantizer = EMAVQ(4, 2, init="normal")
    train_step(quantizer, features(quantizer), features(quantizer))  # of 3 images each
    quantizer(features(quantizer))
    with torch.no_grad():
        quantizer(features(quantizer))
    quantizer(features(quantizer))
    with pytest.raises(RuntimeError, match="over 6 images without after_step"):
        quantizer(features(quantizer))
    assert quantizer.eval()(features(quantizer)).z.shape == (3, 2, 6, 2)


def test_unused_entries_stay_where_they_are_until_they_are_dead():
    quantizer = EMAVQ(codebook_size=2, code_dim=4, init="normal", revive_below=0)
    quantizer.codebook[1] = quantizer.cluster_sum[1] = 100.0
    for seed in range(50):
        train_step(quantizer, features(quantizer, seed=seed))
    torch.testing.assert_close(quantizer.codebook[1], torch.full((4,), 100.0), rtol=1e-3, atol=0)


def test_dead_entries_become_encoder_outputs_with_a_fresh_average():
    quantizer = EMAVQ(codebook_size=4, code_dim=4, decay=0.5, init="normal", revive_below=0.1)
    quantizer.codebook[2:] = quantizer.cluster_sum[2:] = 1000.0
    h = features(quantizer)  # 36 vectors: a share of 9, of which 0.5^4 < 0.1 is left after four steps
    for _ in range(3):
        train_step(quantizer, h)
    assert (quantizer.codebook[2:] > 500).all()
    train_step(quantizer, h)
    outputs = h.permute(0, 2, 3, 1).reshape(-1, 4)
    for entry in (2, 3):
        assert (outputs == quantizer.codebook[entry]).all(dim=1).any()
        assert quantizer.cluster_size[entry] == 9
        assert torch.equal(quantizer.cluster_sum[entry], 9 * quantizer.codebook[entry])
    assert not torch.equal(quantizer.codebook[2], quantizer.codebook[3])


def test_vectors_that_entries_become_outlast_the_features():
    quantizer = EMAVQ(codebook_size=4, code_dim=4, decay=0.0, init="normal", revive_below=0.1)
    quantizer.codebook[2:] = 1000.0
    h = features(quantizer)
    outputs = h.permute(0, 2, 3, 1).reshape(-1, 4)
    quantizer(h)
    h.zero_()  # as an in-place activation may do after the pass
    quantizer.after_step()
    assert all((outputs == entry).all(dim=1).any() for entry in quantizer.codebook[2:])


@pytest.mark.parametrize("num_images", [1, 8, 800])
def test_a_batch_of_another_size_makes_no_used_entry_dead(num_images):
    centres = 3 * torch.randn(16, 8)

    def batch(n):
        codes = (torch.arange(n * 16) * 7 % 16).view(n, 4, 4)
        return (centres[codes] + 0.05 * torch.randn(n, 4, 4, 8)).movedim(-1, 1)

    quantizer = EMAVQ(codebook_size=16, code_dim=8, init="normal")
    quantizer.codebook.copy_(centres)
    quantizer.cluster_sum.copy_(centres)
    for _ in range(3):
        train_step(quantizer, batch(8))
    before = quantizer.codebook.clone()
    for _ in range(3):
        train_step(quantizer, batch(num_images))
        assert (quantizer.codebook - before).norm(dim=1).max() < 0.2  # none was replaced


def test_no_more_entries_are_revived_than_there_are_images():
    quantizer = EMAVQ(codebook_size=9, code_dim=4, decay=0.5, init="normal", revive_below=0.5)
    quantizer.codebook[1:] = quantizer.cluster_sum[1:] = 1000.0
    for _ in range(2):
        train_step(quantizer, features(quantizer, batch=3))
    assert (quantizer.codebook < 500).all(dim=1).sum() == 1 + 3


def test_revival_keeps_a_codebook_in_use_that_is_lost_without():
    used = {}
    for revive_below in (0.0, 0.03):
        torch.manual_seed(0)
        quantizer = EMAVQ(codebook_size=32, code_dim=4, decay=0.8, init="normal", revive_below=revive_below)
        for seed in range(60):
            train_step(quantizer, 5 + features(quantizer, batch=16, seed=seed))
        used[revive_below] = len(quantizer.eval()(5 + features(quantizer, batch=64, seed=99)).codes[0].unique())
    assert used[0.0] < 8
    assert used[0.03] >= 24


# Finite scalar quantization


def test_every_fsq_code_is_reached_and_stands_for_its_own_vector():
    quantizer = FSQ(levels=(8, 3, 4)).eval()
    line = torch.linspace(-4, 4, 60)
    h = torch.stack(torch.meshgrid(line, line, line, indexing="ij")).flatten(2)[None]
    (codes,) = quantizer(h).codes
    assert codes.unique().tolist() == list(range(8 * 3 * 4))
    vectors = quantizer.embed((torch.arange(96).view(1, 96, 1),))[0, :, :, 0].T
    assert len(vectors.unique(dim=0)) == 96
    assert vectors.abs().max() == 1
    # mixed radix, the first channel the least significant
    assert torch.equal(vectors[1 + 2 * 8 + 3 * 24], torch.tensor([-3 / 4, 1.0, 1 / 2]))


@pytest.mark.parametrize("level", [3, 4, 5, 8])
def test_fsq_rounds_a_growing_bounded_function_that_keeps_zero(level):
    quantizer = FSQ(levels=(level,)).eval()
    z = quantizer(torch.linspace(-10, 10, 501).view(1, 1, 1, 501)).z.flatten()
    assert (z.diff() >= 0).all()
    assert z.unique().mul(level // 2).tolist() == [digit - level // 2 for digit in range(level)]
    assert z[250] == 0


def test_the_gradient_of_fsq_is_that_of_the_bound():
    h = torch.linspace(-2, 2, 9, dtype=torch.float32).view(1, 1, 1, 9).requires_grad_()
    FSQ(levels=(5,))(h).z.sum().backward()
    torch.testing.assert_close(h.grad, 1.001 * (1 - h.detach().tanh() ** 2))  # of 2.002 tanh(h) / 2


# Lookup-free quantization


def test_the_code_of_lfq_is_the_binary_number_of_the_signs():
    quantizer = LFQ(num_bits=3).eval()
    h = torch.tensor([[0.2, -1.0, 3.0], [-0.1, -0.2, -0.3], [-1.0, 0.5, 0.0]]).T.view(1, 3, 3, 1)
    out = quantizer(h)
    assert out.codes[0].flatten().tolist() == [1 + 4, 0, 2]
    assert torch.equal(out.z, torch.where(h > 0, 1.0, -1.0))


def brute_force_entropies(vectors: np.ndarray, temperature: float) -> tuple[float, float]:
    """E[H(q)] and H(E[q]) from the N x 2^n matrix of softmax(-distance / temperature)."""
    num_bits = vectors.shape[1]
    entries = np.array([[1.0 if code >> bit & 1 else -1.0 for bit in range(num_bits)] for code in range(2**num_bits)])
    q = np.exp(-((vectors[:, None] - entries[None]) ** 2).sum(2) / temperature)
    q /= q.sum(1, keepdims=True)
    mean = q.mean(0)
    return -(q * np.log(q)).sum(1).mean(), -(mean * np.log(mean)).sum()


@pytest.mark.parametrize("num_bits", [1, 2, 5])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_the_entropy_loss_is_that_of_the_softmax_over_all_codes(num_bits, temperature):
    quantizer = LFQ(num_bits, entropy_weight=0.7, diversity_weight=0.3, temperature=temperature)
    h = features(quantizer)
    rows = h.permute(0, 2, 3, 1).reshape(-1, num_bits).double().numpy()
    per_sample, of_average = brute_force_entropies(rows, temperature)
    expected = 0.7 * (per_sample - 0.3 * of_average)
    assert quantizer(h).losses["entropy"].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_groups_of_independent_bits_have_the_entropy_of_all():
    quantizer = LFQ(num_bits=5)
    line = torch.tensor([-0.7, 0.1, 0.4])
    h = torch.stack(torch.meshgrid(*[line * (bit + 1) for bit in range(5)], indexing="ij")).flatten(1)[None, :, :, None]
    whole = quantizer(h).losses["entropy"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lfq, "JOINT_BITS", 2)
        torch.testing.assert_close(quantizer(h).losses["entropy"], whole)
        # of bits that are copies of each other the groups only know a bound: the loss is lower
        copies = features(quantizer)[:, :1].expand(-1, 5, -1, -1)
        bound = quantizer(copies).losses["entropy"]
    assert bound < quantizer(copies).losses["entropy"] - 0.01


def test_eighteen_bits_need_no_matrix_of_positions_and_codes():
    quantizer = LFQ(num_bits=18)
    h = features(quantizer, batch=1, height=128, width=64).requires_grad_()  # a matrix of 8 GiB
    sum(quantizer(h).losses.values()).backward()
    assert h.grad.isfinite().all()
    assert h.grad.abs().sum() > 0


def test_probabilities_that_underflow_leave_the_gradient_finite():
    quantizer = LFQ(num_bits=4, temperature=0.01)
    h = features(quantizer).requires_grad_()
    quantizer(h).losses["entropy"].backward()
    assert h.grad.isfinite().all()


def test_minimising_the_entropy_loss_spreads_sure_codes_over_the_codebook():
    quantizer = LFQ(num_bits=3)
    h = (1 + 0.1 * features(quantizer, batch=16)).requires_grad_()  # all but the same code
    optimizer = torch.optim.Adam([h], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        quantizer(h).losses["entropy"].backward()
        optimizer.step()
    counts = quantizer(h).codes[0].flatten().bincount(minlength=8)
    assert counts.min() >= 0.5 * counts.sum() / 8
    assert quantizer(h).losses["entropy"].item() == pytest.approx(-0.1 * math.log(8), abs=0.02)


# Gumbel-softmax


def test_the_temperature_falls_from_start_to_end_along_half_a_cosine():
    quantizer = Gumbel(temperature_start=2.0, temperature_end=0.5, decay_steps=100)
    assert [quantizer.temperature(step) for step in (0, 50, 100, 1000)] == pytest.approx([2.0, 1.25, 0.5, 0.5])
    temperatures = [quantizer.temperature(step) for step in range(101)]
    assert temperatures == sorted(temperatures, reverse=True)


@pytest.mark.parametrize("draw", ["forward", "encode"])
def test_gumbel_codes_are_drawn_with_the_probabilities_of_the_logits(draw):
    quantizer = Gumbel(codebook_size=4, code_dim=2)
    logits, n = torch.tensor([0.0, 1.0, -1.0, 2.0]), 20_000
    h = logits.view(1, 4, 1, 1).expand(1, 4, n, 1)
    codes = quantizer(h, step=500).codes[0] if draw == "forward" else quantizer.eval().encode(h, sample=True)[0]
    p = logits.softmax(0)
    # five standard deviations of a binomial count
    assert ((codes.flatten().bincount(minlength=4) / n - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()
    assert (quantizer.encode(h)[0] == 3).all()


def test_z_is_the_average_of_the_entries_that_becomes_the_drawn_one():
    quantizer = Gumbel(codebook_size=4, code_dim=2, temperature_start=1.0, temperature_end=1e-4, decay_steps=10)
    h = features(quantizer)
    warm, cold = quantizer(h, step=0), quantizer(h, step=10)
    assert (warm.z - quantizer.embed(warm.codes)).abs().max() > 0.1
    torch.testing.assert_close(cold.z, quantizer.embed(cold.codes), atol=1e-4, rtol=0)
    assert not torch.equal(quantizer(h, step=10).codes[0], cold.codes[0])


def test_without_a_step_gumbel_takes_the_most_probable_code():
    quantizer = Gumbel(codebook_size=4, code_dim=2)
    h = features(quantizer)
    out = quantizer(h)
    assert torch.equal(out.codes[0], h.argmax(dim=1))
    assert torch.equal(out.z, quantizer.embed(out.codes))


def test_straight_through_decodes_the_drawn_entry_with_the_gradient_of_the_average():
    quantizer = Gumbel(codebook_size=4, code_dim=2, straight_through=True)
    soft = copy.deepcopy(quantizer)
    soft.straight_through = False
    gradients = []
    for q in (quantizer, soft):
        torch.manual_seed(1)
        h = features(q).requires_grad_()
        out = q(h, step=0)
        out.z.sum().backward()
        gradients.append(h.grad)
        assert torch.equal(out.z, q.embed(out.codes)) == q.straight_through
    torch.testing.assert_close(*gradients)


def test_the_kl_is_that_to_the_uniform_distribution():
    quantizer = Gumbel(codebook_size=4, code_dim=2, kl_weight=0.5)
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    expected = {"p": (p * (4 * p).log()).sum().item(), "uniform": 0.0, "sure": math.log(4)}
    for name, logits in (("p", p.log() + 7), ("uniform", torch.ones(4)), ("sure", torch.eye(4)[0] * 1000)):
        loss = quantizer(logits.view(1, 4, 1, 1).expand(2, 4, 3, 3), step=0).losses["kl"]
        assert loss.item() == pytest.approx(0.5 * expected[name], abs=1e-6)


# Residual quantization


def test_residual_quantization_of_depth_one_is_ema_vq():
    residual = Residual(depth=1, codebook_size=5, code_dim=4)
    plain = EMAVQ(codebook_size=5, code_dim=4)
    for seed in range(4):
        h = features(plain, seed=seed)
        mine, theirs = residual(h), plain(h)
        assert torch.equal(mine.z, theirs.z)
        assert torch.equal(mine.codes[0], theirs.codes[0])
        torch.testing.assert_close(mine.losses, theirs.losses)
        residual.after_step()
        plain.after_step()
        torch.testing.assert_close(residual.codebooks[0].codebook, plain.codebook, rtol=0, atol=0)


def test_each_depth_quantizes_what_the_ones_before_it_left():
    quantizer = Residual(depth=3, codebook_size=7, code_dim=4)
    train_step(quantizer, features(quantizer, batch=16))
    h = features(quantizer, seed=1)
    out = quantizer.eval()(h)
    residual, errors = h.permute(0, 2, 3, 1).reshape(-1, 4), [math.inf]
    for stage, codes in zip(quantizer.stages, out.codes):
        assert torch.equal(brute_force(residual, stage.codebook), codes.flatten())
        residual = residual - stage.codebook[codes.flatten()]
        errors.append(residual.square().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert (h - out.z).square().mean().item() == pytest.approx(errors[-1], rel=1e-5)
    # the commitment of every partial sum
    assert out.losses["commitment"].item() == pytest.approx(0.25 * sum(errors[1:]), rel=1e-5)


def test_the_residual_commitment_pulls_the_input_to_every_partial_sum():
    quantizer = Residual(depth=3, codebook_size=7, code_dim=4, init="normal").eval()
    h = features(quantizer).requires_grad_()
    out = quantizer(h)
    (gradient,) = torch.autograd.grad(out.losses["commitment"], h, retain_graph=True)
    entries = torch.stack([s.embed((c,)) for s, c in zip(quantizer.stages, out.codes)])
    expected = 0.25 * 2 * (h.detach() - entries.cumsum(0)).sum(0) / h.numel()
    torch.testing.assert_close(gradient, expected)
    assert torch.equal(torch.autograd.grad(out.z.sum(), h)[0], torch.ones_like(h))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # of torch's own compiler
@pytest.mark.parametrize("init", ["normal", "kmeans"])
@pytest.mark.parametrize("kind", [VQ, EMAVQ])
def test_a_codebook_that_has_started_does_not_make_torch_compile_its_step_twice(kind, init):
    quantizer, h = kind(codebook_size=5, code_dim=4, init=init), torch.randn(2, 4, 3, 3, requires_grad=True)
    if init == "kmeans":
        started = copy.deepcopy(quantizer)
        train_step(started, h)
        quantizer.load_state_dict(started.state_dict())
    torch._dynamo.reset()
    compiled = torch.compile(quantizer, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            train_step(compiled, h)


@pytest.mark.parametrize("kind", [VQ, partial(EMAVQ, revive_below=0.995)], ids=["vq", "ema_vq"])
@pytest.mark.parametrize("init", ["normal", "kmeans"])
def test_codebooks_do_not_depend_on_the_default_device_of_new_tensors(kind, init):
    plain = kind(codebook_size=40, code_dim=4, init=init)
    changed, h = copy.deepcopy(plain), features(plain)
    train_step(plain, h)
    torch.set_default_device("meta")
    try:
        train_step(changed, h)
    finally:
        torch.set_default_device(None)
    assert torch.equal(plain.codebook, changed.codebook)


def test_weights_without_values_can_be_loaded_into_a_codebook_on_the_meta_device():
    with torch.device("meta"):
        quantizer = VQ(codebook_size=5, code_dim=4)
    quantizer.load_state_dict(quantizer.state_dict(), assign=True)
    assert quantizer.codebook.is_meta


def test_every_depth_starts_from_its_own_residuals_and_moves_after_the_step():
    quantizer = Residual(depth=3, codebook_size=4, code_dim=4)
    h = 100 + features(quantizer, batch=16)
    quantizer(h)
    assert all(codebook.initialized for codebook in quantizer.codebooks)
    assert (quantizer.codebooks[0].codebook - 100).abs().max() < 5
    assert all(codebook.codebook.abs().max() < 5 for codebook in quantizer.codebooks[1:])
    started = [codebook.codebook.clone() for codebook in quantizer.codebooks]
    quantizer.after_step()
    assert not any(torch.equal(now.codebook, before) for now, before in zip(quantizer.codebooks, started))


def test_a_shared_codebook_follows_the_vectors_of_all_depths():
    quantizer = Residual(depth=3, codebook_size=4, code_dim=4, shared_codebook=True, decay=0.0, revive_below=0)
    h = features(quantizer, batch=16)
    out = quantizer(h)
    counts = torch.cat(out.codes).flatten().bincount(minlength=4)
    quantizer.after_step()
    assert [name for name, _ in quantizer.named_buffers() if name.endswith("codebook")] == ["codebooks.0.codebook"]
    assert torch.equal(quantizer.codebooks[0].cluster_size, counts.float())


# Initialisation


@pytest.mark.parametrize("quantizer_class", [VQ, EMAVQ])
@pytest.mark.parametrize("init", ["kmeans", "data"])
def test_codebook_starts_from_the_first_training_batch_and_only_once(quantizer_class, init):
    quantizer = quantizer_class(codebook_size=5, code_dim=4, init=init)
    random = quantizer.codebook.clone()
    quantizer.eval()(100 + features(quantizer))
    assert torch.equal(quantizer.codebook, random)
    quantizer.train()(100 + features(quantizer))
    started = quantizer.codebook.clone()
    assert (started - 100).abs().max() < 5
    quantizer(features(quantizer))
    assert torch.equal(quantizer.codebook, started)


def test_loading_an_uninitialised_state_makes_the_codebook_start_again():
    quantizer = VQ(codebook_size=5, code_dim=4)
    state = copy.deepcopy(quantizer.state_dict())
    quantizer(features(quantizer))
    quantizer.load_state_dict(state)
    quantizer(100 + features(quantizer))
    assert (quantizer.codebook - 100).abs().max() < 5


def test_kmeans_finds_separate_clusters_and_is_a_fixed_point():
    centres = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0]])
    vectors = (centres[:, None] + torch.randn(3, 50, 2)).reshape(-1, 2)
    codebook = initial_codebook(vectors, 12, "kmeans")
    codes = nearest(vectors, codebook)
    for code in codes.unique():
        torch.testing.assert_close(codebook[code], vectors[codes == code].mean(dim=0), rtol=1e-2, atol=0.5)
    assert torch.cdist(vectors, codebook).amin(dim=1).mean() < torch.cdist(vectors, centres).amin(dim=1).mean()


@pytest.mark.parametrize("init", ["kmeans", "data"])
def test_fewer_vectors_than_entries_give_distinct_entries(init):
    codebook = initial_codebook(torch.randn(3, 4), 8, init)
    assert codebook.isfinite().all()
    assert len(codebook.unique(dim=0)) == 8


def test_initialisation_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    initial_codebook(torch.randn(9, 2, generator=torch.Generator()), 4, "kmeans")
    assert torch.equal(torch.get_rng_state(), state)


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebook_size": 0}, "codebook_size and code_dim must be at least 1, got 0"),
        ({"commitment_weight": -1.0}, "commitment_weight must be at least 0, got -1.0"),
        ({"init": "zeros"}, "init must be one of kmeans, data, normal, got 'zeros'"),
        ({"decay": 1.0}, r"decay must lie in \[0, 1\), got 1.0"),
        ({"epsilon": 0.0}, "epsilon must be greater than 0, got 0.0"),
        ({"revive_below": 1.0}, r"revive_below must lie in \[0, 1\), got 1.0"),
        ({"codebook_sise": 5}, "did you mean 'codebook_size'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build("quantizer", QUANTIZERS, {"type": "ema_vq", **options})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fsq", {"levels": (5, 2)}, r"levels must be integers of at least 3, .*got \(5, 2\)"),
        ("fsq", {"levels": ()}, r"levels must be integers of at least 3, .*got \(\)"),
        ("fsq", {"levels": (9,) * 20}, r"product of 2\^63 - 1 at most, to fit into int64, got \(9, 9"),
        ("lfq", {"num_bits": 0}, r"num_bits must lie in \[1, 62\], .*got 0"),
        ("lfq", {"temperature": 0.0}, "temperature must be greater than 0, got 0.0"),
        ("lfq", {"diversity_weight": -1.0}, "diversity_weight must be at least 0, got -1.0"),
        ("gumbel", {"code_dim": 0}, "codebook_size and code_dim must be at least 1, got 512 and 0"),
        ("gumbel", {"temperature_end": 2.0}, "must not rise, got temperature_start = 1.0 and temperature_end = 2.0"),
        ("gumbel", {"decay_steps": 0}, "decay_steps must be at least 1, got 0"),
        ("gumbel", {"kl_weight": -0.1}, "kl_weight must be at least 0, got -0.1"),
        ("residual", {"depth": 0}, "depth must be at least 1, got 0"),
        ("residual", {"codebook_size": 0}, "codebook_size and code_dim must be at least 1, got 0"),
    ],
)
def test_options_that_a_quantizer_cannot_work_with_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build("quantizer", QUANTIZERS, {"type": name, **options})


def test_losses_do_not_depend_on_the_layout_of_the_features():
    quantizer = VQ(codebook_size=5, code_dim=4, init="normal")
    h = features(quantizer)
    expected = quantizer.commitment_weight * F.mse_loss(h, quantizer.embed(quantizer(h).codes))
    channels_last = quantizer(h.to(memory_format=torch.channels_last))
    torch.testing.assert_close(channels_last.losses["commitment"], expected)
