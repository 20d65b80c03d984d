"""Quantizers against independent implementations with equal parameters: equal codes, vectors and losses."""

import pytest
import torch
import torch.nn.functional as F

from tokenizer.quantizers import FSQ, LFQ, Gumbel, Residual

peers = pytest.importorskip("vector_quantize_pytorch")


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (7, 6), (3, 4)])
def test_fsq_is_that_of_vector_quantize_pytorch(levels):
    quantizer, peer = FSQ(levels).eval(), peers.FSQ(levels)
    h = 3 * torch.randn(4, len(levels), 9, 7)
    out, (peer_z, peer_codes) = quantizer(h), peer(h)
    assert torch.equal(out.codes[0], peer_codes)
    torch.testing.assert_close(out.z, peer_z, rtol=0, atol=1e-6)  # it adds and subtracts the input
    torch.testing.assert_close(quantizer.embed(out.codes), peer.indices_to_codes(peer_codes), rtol=0, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_lfq_is_that_of_vector_quantize_pytorch(temperature):
    quantizer = LFQ(5, entropy_weight=0.1, diversity_weight=0.8, temperature=temperature, commitment_weight=0.25)
    peer = peers.LFQ(dim=5, entropy_loss_weight=0.1, diversity_gamma=0.8, commitment_loss_weight=0.25)
    h = torch.randn(4, 5, 9, 7)
    out = quantizer(h)
    flipped = h.flip(1)  # its first channel is the most significant
    (peer_z, peer_codes, peer_loss), parts = peer(flipped, inv_temperature=1 / temperature, return_loss_breakdown=True)
    assert torch.equal(out.codes[0], peer_codes)
    torch.testing.assert_close(out.z.flip(1), peer_z, rtol=0, atol=1e-6)
    # it bounds its logarithms at 1e-5
    entropy = 0.1 * (parts.per_sample_entropy - 0.8 * parts.batch_entropy)
    torch.testing.assert_close(out.losses["entropy"], entropy, rtol=1e-3, atol=0)
    torch.testing.assert_close(sum(out.losses.values()), peer_loss, rtol=1e-3, atol=0)


@pytest.mark.parametrize("shared", [False, True])
def test_residual_quantization_is_that_of_vector_quantize_pytorch(shared):
    quantizer = Residual(depth=3, codebook_size=16, code_dim=4, shared_codebook=shared, init="normal").eval()
    peer = peers.ResidualVQ(dim=4, num_quantizers=3, codebook_size=16, shared_codebook=shared).eval()
    for stage, layer in zip(quantizer.stages, peer.layers):
        layer._codebook.embed.data.copy_(stage.codebook[None])
    h = torch.randn(4, 4, 9, 7)
    out = quantizer(h)
    peer_z, peer_codes, _ = peer(h.flatten(2).mT)
    assert torch.equal(torch.stack(out.codes, dim=-1).flatten(1, 2), peer_codes)
    torch.testing.assert_close(out.z.flatten(2).mT, peer_z, rtol=0, atol=1e-5)


@pytest.mark.parametrize("straight_through", [False, True])
def test_the_relaxed_sample_is_that_of_torch(straight_through):
    quantizer = Gumbel(codebook_size=6, code_dim=3, temperature_start=0.8, straight_through=straight_through)
    h = torch.randn(4, 6, 5, 3)
    torch.manual_seed(1)
    out = quantizer(h, step=0)
    torch.manual_seed(1)
    weights = F.gumbel_softmax(h.movedim(1, -1).contiguous(), tau=0.8, hard=straight_through)
    torch.testing.assert_close(out.z, (weights @ quantizer.codebook).movedim(-1, 1), rtol=0, atol=1e-5)
    assert torch.equal(out.codes[0], weights.argmax(dim=-1))
