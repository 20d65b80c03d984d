"""Laws of every tokenizer, with every part that it can be built from, and of the networks."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tokenizer import TOKENIZERS, VQVAE, VQVAE2
from tokenizer.latent_networks import LATENT_NETWORKS
from tokenizer.latent_vae import LatentVAE
from tokenizer.likelihoods import LIKELIHOODS
from tokenizer.networks import NETWORKS
from tokenizer.quantizers import QUANTIZERS
from tokenizer.registry import build
from tokenizer.smoothing import SMOOTHINGS
from tokenizer.vqvae import VQVAEConfig
from tokenizer.vqvae2 import VQVAE2Config

BITS = {"type": "bernoulli"}
VARIANTS = [
    *((name, {}) for name in sorted(TOKENIZERS)),
    *(("vqvae", {"quantizer": {"type": name, **tiny.QUANTIZERS.get(name, {})}}) for name in sorted(QUANTIZERS)),
    *(("vqvae", {"network": {"type": name, **tiny.NETWORKS.get(name, {})}}) for name in sorted(NETWORKS)),
    *(("vqvae", {"likelihood": {"type": name, **tiny.LIKELIHOODS.get(name, {})}}) for name in sorted(LIKELIHOODS)),
    *(
        ("dvaepp", {"network": {"type": name, **tiny.LATENT_NETWORKS.get(name, {})}})
        for name in sorted(LATENT_NETWORKS)
    ),
    *(("dvaesharp", {"smoothing": {"type": name, **tiny.SMOOTHINGS.get(name, {})}}) for name in sorted(SMOOTHINGS)),
    *((name, {"prior": BITS}) for name in ("dvae", "dvaepp", "dvaesharp", "gumbolt", "nvil", "vimco")),
    *(
        (name, {"network": {"type": "conv", **tiny.LATENT_NETWORKS["conv"]}})
        for name in ("cvae", "gaussian_vae", "gumbel_softmax")
    ),
    *((name, {"prior": {"type": "gaussian_mixture", "num_components": 2}}) for name in ("cvae", "gaussian_vae")),
]


def label(variant) -> str:
    name, parts = variant
    return "-".join([name, *(options["type"] for options in parts.values())])


@pytest.fixture(params=VARIANTS, ids=label)
def tokenizer(request):
    name, parts = request.param
    return make(name, **parts)


def make(name: str, **overrides):
    if name not in tiny.TOKENIZERS:
        pytest.fail(f"no tiny configuration of tokenizer '{name}' in tests/tiny.py")
    return TOKENIZERS[name](TOKENIZERS[name].Config(**{**tiny.TOKENIZERS[name], **overrides}))


def random_images(tokenizer, batch: int = 3, seed: int = 0) -> Tensor:
    """Binary images: every likelihood takes them."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, *tokenizer.config.image_shape, generator=generator) > 0.5).float()


def seed() -> torch.Generator:
    """For decoders with latents of their own."""
    return torch.Generator().manual_seed(0)


def some_labels(tokenizer, count: int = 3) -> Tensor | None:
    """For tokenizers that are conditional on classes."""
    return torch.arange(count) % tokenizer.num_classes if tokenizer.num_classes else None


def train_pass(tokenizer, images: Tensor, step: int = 0):
    labels = some_labels(tokenizer, len(images))
    return tokenizer.train()(images, step, *([] if labels is None else [labels]))


def train_step(tokenizer, images: Tensor) -> None:
    optimizer = torch.optim.SGD(tokenizer.parameters(), lr=0.01)
    sum(train_pass(tokenizer, images).losses.values()).backward()
    optimizer.step()
    tokenizer.after_step()


def trained(tokenizer):
    tokenizer.initialize(random_images(tokenizer))
    train_step(tokenizer, random_images(tokenizer))
    tokenizer.zero_grad()
    return tokenizer.eval()


# Laws over the registry


def test_forward_gives_images_codes_and_scalar_losses(tokenizer):
    images = random_images(tokenizer)
    out = train_pass(tokenizer, images)
    tokenizer.spec.check(out.codes)
    assert out.images.shape == images.shape
    assert 0 <= out.images.min() <= out.images.max() <= 1
    assert out.losses
    assert all(loss.shape == () and loss.isfinite() for loss in out.losses.values())


def test_prior_covers_the_codes(tokenizer):
    codes = trained(tokenizer).encode(random_images(tokenizer))
    tokenizer.spec.check(codes)
    assert tokenizer.prior.spec == tokenizer.spec
    assert tokenizer.prior.log_prob(codes, some_labels(tokenizer)).shape == (3,)
    sampled = tokenizer.prior.sample(2, some_labels(tokenizer, 2))
    assert tokenizer.decode(sampled).shape == (2, *tokenizer.config.image_shape)


def test_every_parameter_receives_a_finite_gradient(tokenizer):
    sum(train_pass(tokenizer, random_images(tokenizer)).losses.values()).backward()
    missing = [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


def test_codes_of_an_image_do_not_depend_on_the_batch(tokenizer):
    images = random_images(tokenizer)
    batch = trained(tokenizer).encode(images)
    for i in range(len(images)):
        alone = tokenizer.encode(images[i : i + 1])
        for level, single in zip(batch, alone):  # integers equal, real numbers up to rounding
            torch.testing.assert_close(level[i : i + 1], single)


def test_no_images_have_no_codes_and_no_codes_are_no_images(tokenizer):
    images = random_images(tokenizer, batch=0)
    codes = trained(tokenizer).encode(images)
    tokenizer.spec.check(codes)
    assert len(codes[0]) == len(tokenizer.draw_posterior(images).log_q) == 0
    assert tokenizer.decode(codes, seed()).shape == tokenizer(images).images.shape == images.shape


def test_codes_depend_on_the_image(tokenizer):
    with torch.no_grad():
        for parameter in tokenizer.parameters():  # a fresh network hardly looks at its input
            parameter += 0.3 * torch.randn_like(parameter)
    trained(tokenizer)
    first, second = (tokenizer.encode(random_images(tokenizer, batch=32, seed=s)) for s in (0, 1))
    assert any(not torch.equal(a, b) for a, b in zip(first, second))


def test_every_level_of_the_codes_matters_to_the_image(tokenizer):
    codes = trained(tokenizer).encode(random_images(tokenizer))
    for level, vocab_size in enumerate(tokenizer.spec.vocab_sizes):
        changed = codes[level] + 1 if vocab_size is None else (codes[level] + 1) % vocab_size
        other = [*codes[:level], changed, *codes[level + 1 :]]
        assert not torch.equal(tokenizer.decode(codes, seed()), tokenizer.decode(tuple(other), seed()))


def test_evaluation_is_deterministic(tokenizer):
    images = random_images(tokenizer)
    trained(tokenizer)
    first, second = tokenizer(images), tokenizer(images)
    assert torch.equal(first.images, second.images)
    assert torch.equal(tokenizer.decode(first.codes, seed()), tokenizer.decode(first.codes, seed()))


def test_saved_state_decodes_bit_for_bit(tokenizer):
    state = copy.deepcopy(trained(tokenizer).state_dict())
    codes = tokenizer.encode(random_images(tokenizer))
    images = tokenizer.decode(codes, seed())
    train_step(tokenizer, random_images(tokenizer, seed=1))
    tokenizer.load_state_dict(state)
    again = tokenizer.eval().encode(random_images(tokenizer))
    assert all(torch.equal(a, b) for a, b in zip(again, codes))
    assert torch.equal(tokenizer.decode(codes, seed()), images)


def test_nll_is_one_finite_number_per_image(tokenizer):
    images = random_images(tokenizer)
    codes = trained(tokenizer).encode(images)
    nll = tokenizer.nll(images, codes)
    assert nll.shape == (3,)
    assert nll.isfinite().all()
    if not tokenizer.has_local_latents:
        alone = tokenizer.nll(images[1:2], tuple(c[1:2] for c in codes))
        torch.testing.assert_close(alone, nll[1:2], rtol=1e-5, atol=0)


def test_training_inside_bfloat16_autocast(tokenizer):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = train_pass(tokenizer, random_images(tokenizer))
    sum(out.losses.values()).backward()
    tokenizer.after_step()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in tokenizer.parameters())
    assert all(loss.dtype == torch.float32 for loss in out.losses.values())


def test_training_with_weights_in_bfloat16(tokenizer):
    tokenizer = tokenizer.bfloat16()
    out = train_pass(tokenizer, random_images(tokenizer).bfloat16())
    sum(out.losses.values()).backward()
    tokenizer.after_step()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.bfloat16 for p in tokenizer.parameters())
    tokenizer.spec.check(tokenizer.eval().encode(random_images(tokenizer).bfloat16()))


def test_a_wrong_image_size_is_named(tokenizer):
    with pytest.raises(ValueError, match=r"images of shape \(batch, 3, 8, 8\), got \(2, 3, 8, 9\)"):
        tokenizer.encode(torch.zeros(2, 3, 8, 9))


def test_an_image_that_has_no_codes_is_refused(tokenizer):
    images = random_images(tokenizer)
    images[1, 0, 2, 3] = math.nan
    acts = (trained(tokenizer).encode, tokenizer, tokenizer.draw_posterior)
    for act in acts:
        with pytest.raises(ValueError, match=r"must be floating-point in \[0, 1\], got torch.float32 from nan to nan"):
            act(images)
        with pytest.raises(ValueError, match=r"must be floating-point in \[0, 1\], got torch.uint8 from 0 to 200"):
            act((200 * random_images(tokenizer).round()).byte())
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.fill_(math.nan)
    for act in acts:
        with pytest.raises(ValueError, match="the encoder's output is not finite, so it has no codes"):
            act(random_images(tokenizer))


@pytest.mark.parametrize("value", [math.nan, 3e38])
@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("name", sorted(name for name, kind in TOKENIZERS.items() if issubclass(kind, LatentVAE)))
def test_outputs_of_an_encoder_that_are_not_finite_are_refused_but_in_training(name, group, value):
    tokenizer = make(name).eval()
    encoder = tokenizer.network.encoders[min(group, len(tokenizer.network.encoders) - 1)]
    with torch.no_grad():
        encoder[0].bias.fill_(10.0)  # then the layer gives ones, whose sum times 3e38 is too large
        encoder[-1].weight.fill_(value)
    with pytest.raises(ValueError, match="the encoder's output is not finite, so it has no codes"):
        tokenizer.encode(random_images(tokenizer))
    train_pass(tokenizer, random_images(tokenizer))  # the loop looks at its gradients


@pytest.mark.parametrize("image_shape", [(1, 9, 6), (3, 8, 12), (1, 1, 1), (3, 5, 17)])
@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_any_image_size_works(name, image_shape):
    tokenizer = make(name, image_shape=image_shape)
    trained(tokenizer)
    images = random_images(tokenizer)
    out = tokenizer(images)
    tokenizer.spec.check(out.codes)
    assert out.images.shape == tokenizer.decode(tokenizer.encode(images)).shape == images.shape
    assert tokenizer.nll(images, out.codes).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(name for name, kind in TOKENIZERS.items() if issubclass(kind, LatentVAE)))
def test_pixels_that_are_always_white_have_a_likelihood_in_half_precision(name, dtype):
    tokenizer = make(name)
    images = random_images(tokenizer).round()
    images[..., 0] = 1
    tokenizer.initialize(images)
    tokenizer = tokenizer.eval().to(dtype)
    assert tokenizer.nll(images.to(dtype), tokenizer.encode(images.to(dtype))).isfinite().all()


@pytest.mark.parametrize("name", ["vqvae", "vqvae2"])
def test_reconstruction_is_what_the_codes_decode_to(name):
    tokenizer = trained(make(name))
    images = random_images(tokenizer)
    out = tokenizer(images)
    assert torch.equal(tokenizer.decode(out.codes), out.images)
    assert all(torch.equal(a, b) for a, b in zip(tokenizer.encode(images), out.codes))


class InOneMemory:
    """A backend of torch.compile whose graphs write their results over those of their run before, as CUDA graphs do."""

    def __init__(self):
        self.num_graphs = 0

    def __call__(self, graph, inputs):
        self.num_graphs += 1
        before: list[Tensor] = []

        def run(*arguments):
            for result in before:
                result.fill_(torch.nan)
            results = graph(*arguments)
            given = {x.untyped_storage().data_ptr() for x in arguments if isinstance(x, Tensor)}
            before[:] = [
                x
                for x in results
                if x.is_floating_point() and not x.requires_grad and x.untyped_storage().data_ptr() not in given
            ]
            return results

        return run


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # of torch's own compiler
@pytest.mark.parametrize("name", ["concrete", "dvaepp", "gaussian_vae"])
def test_a_compiled_autoencoder_remembers_what_its_latents_carry(name):
    network = {"type": "conv", **tiny.LATENT_NETWORKS["conv"]}  # with latents of the decoder's own
    plain = make(name, **({"network": network} if name == "gaussian_vae" else {})).train()
    compiled, backend = copy.deepcopy(plain), InOneMemory()
    torch._dynamo.reset()
    compiled.compile(backend=backend)
    for model in (plain, compiled):
        torch.manual_seed(0)
        for _ in range(3):
            sum(model(random_images(model), 5).losses.values()).backward()
    torch.testing.assert_close(compiled.nats_by_group, plain.nats_by_group)
    assert compiled._local_groups == plain._local_groups
    # a Boltzmann prior's chains move between graphs
    assert backend.num_graphs == 1 or name == "dvaepp"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # of torch's own compiler
@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_steps_share_compiled_graphs(name):
    model, num_graphs, num_after = make(name).train(), 0, []

    def count(graph, inputs):
        nonlocal num_graphs
        num_graphs += 1
        return graph

    model.initialize(random_images(model))
    torch._dynamo.reset()
    model.compile(backend=count)
    for step in range(6):
        train_pass(model, random_images(model), step)
        num_after.append(num_graphs)
    assert num_after[2] == num_after[-1], num_after  # the step is a number that graphs take from the second or third on


@pytest.mark.parametrize("name", ["vqvae", "vqvae2"])
def test_initialisation_starts_every_codebook_and_leaves_no_statistics(name):
    tokenizer = make(name).eval()
    tokenizer.initialize(random_images(tokenizer))
    started = copy.deepcopy(tokenizer.state_dict())
    tokenizer.after_step()
    assert not tokenizer.training
    assert all(value for key, value in started.items() if key.endswith("initialized"))
    assert all(torch.equal(value, started[key]) for key, value in tokenizer.state_dict().items())


@pytest.mark.parametrize("name", ["vqvae", "vqvae2"])
def test_features_begin_at_unit_scale_where_the_quantizer_has_a_fixed_one(name):
    options = {"quantizer": {"type": "fsq", "levels": (8, 8)}}
    tokenizer = make(name, **options, **({"codebook_sizes": None} if name == "vqvae2" else {}))
    images = random_images(tokenizer)
    codes_before = torch.cat([level.flatten() for level in tokenizer.encode(images)]).unique()
    tokenizer.initialize(images)
    seen = []
    for quantizer in getattr(tokenizer, "quantizers", [getattr(tokenizer, "quantizer", None)]):
        quantizer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    codes = tokenizer.train()(images).codes
    assert len(seen) == len(codes)
    for features in seen:
        deviation, mean = torch.std_mean(features, dim=(0, 2, 3), correction=0)
        assert torch.allclose(mean, torch.zeros(2), atol=1e-4)
        assert torch.allclose(deviation, torch.ones(2), atol=1e-3)
    assert len(torch.cat([level.flatten() for level in codes]).unique()) > 4 * len(codes_before)


@pytest.mark.parametrize("name", ["vqvae", "vqvae2"])
def test_a_decoder_of_binary_images_starts_at_their_mean(name):
    tokenizer = make(name, likelihood={"type": "bernoulli"})
    images = (random_images(tokenizer, batch=16) * random_images(tokenizer, batch=16, seed=1)).roll(
        1
    )  # a quarter white
    tokenizer.initialize(images)
    shown = tokenizer.eval()(images).images.mean(dim=(0, 2, 3))
    assert torch.allclose(shown, images.mean(dim=(0, 2, 3)), atol=0.05)


def test_fsq_learns_binary_images_that_are_mostly_black():
    """Without the initialisation by data all codes become one within the first steps, and stay so."""
    torch.manual_seed(0)
    tokenizer = make("vqvae", quantizer={"type": "fsq", "levels": (8, 8)}, likelihood={"type": "bernoulli"}).train()
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(6, (64, 2), generator=generator).tolist()
    images = torch.zeros(64, *tokenizer.config.image_shape)
    for image, (top, left) in zip(images, corners):
        image[:, top : top + 3, left : left + 2] = 1
    tokenizer.initialize(images)
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=0.002)
    for step in range(300):
        out = tokenizer(images, step)
        optimizer.zero_grad()
        sum(out.losses.values()).backward()
        optimizer.step()
    assert len(out.codes[0].unique()) > 4
    assert out.losses["reconstruction"] < 0.1


@pytest.mark.parametrize("name", [name for name, kind in TOKENIZERS.items() if "quantizer" in kind.parts])
def test_every_codebook_moves_after_a_step(name):
    of_averages = {"type": "ema_vq", **tiny.QUANTIZERS["ema_vq"]}
    state = trained(make(name, quantizer=of_averages)).state_dict()
    updates = [value for key, value in state.items() if key.endswith("num_updates")]
    assert updates
    assert all(value == 1 for value in updates)


@pytest.mark.parametrize("name", ["vqvae", "vqvae2"])
def test_networks_see_images_from_minus_one_to_one(name):
    tokenizer = make(name)
    seen = []
    encoder = tokenizer.encoder if name == "vqvae" else tokenizer.encoders[-1]
    encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    tokenizer(random_images(tokenizer))
    assert (seen[0].min(), seen[0].max()) == (-1, 1)


@pytest.mark.parametrize("name", ["vqvae", "vqvae2"])
def test_a_few_steps_reduce_the_reconstruction_loss(name):
    tokenizer = make(name)
    images = torch.rand(8, 3, 1, 1).expand(8, 3, 8, 8)
    tokenizer.initialize(images)
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=0.01)
    history = []
    for _ in range(100):
        losses = tokenizer(images).losses
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        tokenizer.after_step()
        history.append(losses["reconstruction"].item())
    assert history[-1] < 0.75 * history[0]


# VQ-VAE and VQ-VAE-2


LATENT_VAES = sorted(name for name, cls in TOKENIZERS.items() if issubclass(cls, LatentVAE))


@pytest.mark.parametrize("name", LATENT_VAES)
def test_local_latents_start_at_their_own_kl_weight_and_end_at_one(name):
    network = {"type": "conv", "hidden_dims": (8,), "local_dims": (2,), "global_dim": 8}

    def gradient(step: int, **options) -> Tensor:
        """Of the training loss, for the parameters of q(h | x, z), which nothing but the bound reaches."""
        torch.manual_seed(0)
        model = make(name, network=network, kl_warmup_steps=4, weight_decay=0.0, **options).double().train()
        images = random_images(model).double()
        labels = some_labels(model, len(images))
        torch.manual_seed(0)
        losses = model(images, step, *([] if labels is None else [labels])).losses
        return torch.autograd.grad(sum(losses.values()), model.network.locals[0].posterior[1].weight)[0]

    assert torch.equal(gradient(3, local_kl_start=4.0), gradient(3))  # the warm-up is over
    # Weights at the first step, of 0.25 for the others: 0.25, 1 and 3.25; one image is drawn for once
    draws = {} if TOKENIZERS[name].Config.num_draws > 1 else {"num_draws": 1}
    none, one, four = (gradient(0, **draws, local_kl_start=start) for start in (0.0, 1.0, 4.0))
    assert not torch.allclose(one, none)
    if draws:
        torch.testing.assert_close((four - none) / 3.0, (one - none) / 0.75)


def test_code_maps_have_the_rounded_up_size():
    assert make("vqvae", image_shape=(3, 9, 6)).spec.shapes == ((3, 2),)
    assert make("vqvae2", image_shape=(3, 9, 6)).spec.shapes == ((3, 2), (6, 4))


def test_levels_go_from_coarse_to_fine_with_their_own_codebooks():
    tokenizer = make("vqvae2", downsample_factors=(8, 4, 1), codebook_sizes=(2, 3, 4))
    assert tokenizer.spec.shapes == ((1, 1), (2, 2), (8, 8))
    assert tokenizer.spec.vocab_sizes == (2, 3, 4)
    losses = tokenizer(random_images(tokenizer)).losses
    assert {"commitment_0", "commitment_1", "commitment_2"} <= set(losses)


def test_finer_levels_know_the_coarser_codes():
    tokenizer = trained(make("vqvae2"))
    images = random_images(tokenizer, batch=8)
    before = tokenizer.encode(images)
    with torch.no_grad():
        tokenizer.from_quantizers[0].bias += 10
    after = tokenizer.encode(images)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def test_a_coarse_code_reaches_its_own_region_of_the_finest_map():
    tokenizer = make("vqvae2", downsample_factors=(4, 1))
    latents = [torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 8, 8)]
    tokenizer.decoders[-1] = nn.Identity()
    latents[0][:, :, 0, 1] = 1
    seen = tokenizer._params(latents)
    assert seen.shape == (1, 8, 8, 8)
    assert seen.sum() == seen[:, :4, :4, 4:].sum() == 4 * 16


@pytest.mark.parametrize(
    ("make_bad", "message"),
    [
        (lambda: VQVAEConfig(image_shape=(3, 8, 8), downsample_factor=3), "power of two, at least 1, got 3"),
        (lambda: VQVAEConfig(image_shape=(3, 8, 8), latent_dim=0), "latent_dim must be at least 1, got 0"),
        (lambda: VQVAEConfig(image_shape=(2, 8, 8)), "image_shape must be"),
        (lambda: VQVAEConfig(image_shape=(28, 28)), r"image_shape must be .*, got \(28, 28\)"),
        (lambda: VQVAEConfig(image_shape=28), "image_shape must be .*, got 28"),
        (lambda: VQVAE2Config(image_shape=(3, 8, 8), downsample_factors=(4, 4)), "must decrease from coarse to fine"),
        (lambda: VQVAE2Config(image_shape=(3, 8, 8), downsample_factors=()), "must decrease from coarse to fine"),
        (lambda: VQVAE2Config(image_shape=(3, 8, 8), downsample_factors=(6, 2)), "power of two, at least 1, got 6"),
        (lambda: VQVAE2Config(image_shape=(3, 8, 8), codebook_sizes=(5,)), "one entry for each of the 2 levels"),
        (lambda: make("vqvae", quantizer={"type": "ema-vq"}), "unknown quantizer 'ema-vq'; did you mean 'ema_vq'"),
        (lambda: make("vqvae", network={"type": "conv", "width": 3}), "network 'Conv' has no option 'width'"),
        (lambda: make("vqvae", likelihood={}), "likelihood needs a 'type'"),
        (lambda: make("vqvae", likelihood="normal"), "likelihood must be a dict such as .*, got 'normal'"),
    ],
)
def test_configurations_that_cannot_work_are_refused(make_bad, message):
    with pytest.raises(ValueError, match=message):
        make_bad()


def test_configurations_take_lists():
    config = VQVAE2Config(image_shape=[3, 8, 8], downsample_factors=[4, 2], codebook_sizes=[3, 5])
    assert config == VQVAE2Config(image_shape=(3, 8, 8), downsample_factors=(4, 2), codebook_sizes=(3, 5))
    assert VQVAE2.Config is VQVAE2Config
    assert VQVAE.Config is VQVAEConfig


# Networks


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["vqvae", "vqvae2"])
def test_feature_maps_keep_their_channels_side_by_side(name, channels):
    """The layout in which convolutions and the search are fastest, from the image to the last map."""
    tokenizer = make(name, image_shape=(channels, 8, 8))
    maps = []
    for module in tokenizer.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(lambda module, inputs, output: maps.append(output))
    tokenizer(random_images(tokenizer))
    assert len(maps) > 5
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in maps)


@pytest.mark.parametrize("factor", [1, 2, 8])
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_networks_scale_by_their_factor_and_use_every_parameter(name, factor):
    if name not in tiny.NETWORKS:
        pytest.fail(f"no tiny configuration of network '{name}' in tests/tiny.py")
    network = build("network", NETWORKS, {"type": name, **tiny.NETWORKS[name]})
    encoder, decoder = network.encoder(3, 5, factor), network.decoder(5, 7, factor)
    x = torch.randn(2, 3, 2 * factor, 3 * factor, requires_grad=True)
    h = encoder(x)
    y = decoder(h)
    y.square().sum().backward()
    assert h.shape == (2, 5, 2, 3)
    assert y.shape == (2, 7, 2 * factor, 3 * factor)
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None for p in [*encoder.parameters(), *decoder.parameters()])


@pytest.mark.parametrize("factor", [1, 2, 8])
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_a_decoder_is_a_sequence_that_ends_in_a_layer_with_a_bias(name, factor):
    decoder = build("network", NETWORKS, {"type": name, **tiny.NETWORKS[name]}).decoder(5, 7, factor)
    assert isinstance(decoder, nn.Sequential)
    with torch.no_grad():
        decoder[-1].weight.zero_()
        decoder[-1].bias.copy_(torch.arange(7))
        y = decoder(torch.randn(2, 5, 2, 3))
    assert y.equal(torch.arange(7.0)[:, None, None].expand_as(y))


@pytest.mark.parametrize("factor", [0, 3, -2])
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_networks_refuse_factors_that_are_no_power_of_two(name, factor):
    network = build("network", NETWORKS, {"type": name, **tiny.NETWORKS[name]})
    for half in (network.encoder, network.decoder):
        with pytest.raises(ValueError, match=f"power of two, at least 1, got {factor}"):
            half(3, 3, factor)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "conv", "hidden_dim": 1}, "hidden_dim >= 2"),
        ({"type": "resnet", "dim_multipliers": ()}, "sizes of at least 1"),
    ],
)
def test_networks_refuse_sizes_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        build("network", NETWORKS, options)
