"""Restricted Boltzmann machine over the bits of codes, learned with a tokenizer or from codes on disk."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from prior.annealed_importance import LARGEST_SUM, LogPartition, estimated_log_partition, exact_log_partition
from prior.base import Codes, check_positive, silent
from prior.bits import BitPrior, BitPriorConfig, bits_to_codes, codes_to_bits, mask_to_bits
from prior.boltzmann_samplers import BlockGibbs, Boltzmann, exchange_temperatures, reweight_population
from prior.sampling import NOT_NUMBERS

SAMPLERS = ("gibbs", "population_annealing", "parallel_tempering")
# Sweeps whose noise `sample` draws at once: a number that does not depend on the batch, for images not to either
SWEEPS_OF_NOISE = 8
# Temperatures below it give the same samples, and no infinite logits
COLDEST = 1e-6
# Chains that keep more of their state than this over a step, where independent ones would change it, are frozen
FROZEN_AUTOCORRELATION = 0.98
# One weight of this many nats fixes a unit by itself (odds of e^10)
LARGEST_WEIGHT = 10.0


@dataclass(frozen=True, kw_only=True)
class RBMConfig(BitPriorConfig):
    """Sizes, and how the chains are run.

    Args:
        num_chains: persistent chains for the gradient of log Z.
        num_sweeps: block-Gibbs sweeps of these chains per training step.
        sampler: what moves the chains in training: sweeps alone; population annealing, which first resamples the
            chains for the step that the parameters made; or parallel tempering, for models whose modes do not mix.
        num_temperatures: of parallel tempering, from infinite to 1; it costs as many times the sweeps.
        burn_in: sweeps from the persistent chains on, of `sample` and before log Z is estimated.
        ais_chains: chains that estimate log Z, where it is not summed exactly.
        ais_temperatures: inverse temperatures from 0 to 1 that they pass through.
    Raises:
        ValueError: an unknown sampler, or a size out of range.
    """

    num_chains: int = 200
    num_sweeps: int = 5
    sampler: Literal["gibbs", "population_annealing", "parallel_tempering"] = "gibbs"
    num_temperatures: int = 10
    burn_in: int = 200
    ais_chains: int = 512
    ais_temperatures: int = 1000

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "num_chains", "num_sweeps")
        check_sizes(self)
        if self.sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler '{self.sampler}'; choose from {', '.join(SAMPLERS)}")
        if not self.num_temperatures >= 2:
            raise ValueError(f"num_temperatures must be at least 2, got {self.num_temperatures}")


def check_sizes(sizes: "RBMConfig | RBM") -> None:
    """Raises ValueError unless an estimate of log Z can be made by these sizes."""
    for name, least in (("burn_in", 1), ("ais_chains", 2), ("ais_temperatures", 2)):
        if not getattr(sizes, name) >= least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(sizes, name)}")


class RBM(BitPrior):
    """A restricted Boltzmann machine (Smolensky 1986): p(z) = exp(-E(z)) / Z, E(z) = -b1 z_L - b2 z_R - z_L W z_R.

    The gradient of log Z is the mean over persistent chains (Tieleman 2008), which move by a few block-Gibbs sweeps
    per training step, with E[z_R | z_L] in the place of z_R. log Z itself is not needed in training; to evaluate, it
    is summed where a side has at most 16 units, and else estimated from both ends (`prior.annealed_importance`).

    Attributes:
        weight (n1, n2), left_bias (n1,), right_bias (n2,): W, b1, b2; all 0 at first, so that log Z = n log 2.
        chains: (num_chains, n) uint8 states, saved with the model. Each process of a distributed run has its own.
        per_process_buffers: names of the buffers that differ between processes, for a loop that saves them.
        autocorrelation: of the chains over the last training step: 1 where they are frozen.
        burn_in: sweeps that `sample` makes, from a state of `chains` that the image's own noise chooses; `callback`
            follows it.
        ais_chains, ais_temperatures: of estimates of log Z. Like burn_in they start as the configuration's and may be
            changed; the next estimate follows. A saved model has the configuration's.
    Args:
        config: code space, sides and chains.
    """

    Config = RBMConfig
    sampling_options = frozenset({"temperature", "given"})

    def __init__(self, config: RBMConfig):
        super().__init__(config)
        self.burn_in, self.ais_chains = config.burn_in, config.ais_chains
        self.ais_temperatures = config.ais_temperatures
        self.weight = nn.Parameter(torch.zeros(self.num_left, self.num_right))
        self.left_bias = nn.Parameter(torch.zeros(self.num_left))
        self.right_bias = nn.Parameter(torch.zeros(self.num_right))
        self.register_buffer("chains", _random_bits(config.num_chains, self.num_bits))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))  # moves of the chains; 0: not started
        self.per_process_buffers = ("chains", "num_updates")
        if config.sampler == "population_annealing":  # parameters that the chains are samples of
            for name, parameter in self.boltzmann()._asdict().items():
                self.register_buffer(f"old_{name}", torch.zeros_like(parameter))
        if config.sampler == "parallel_tempering":
            hot = _random_bits(config.num_temperatures - 1, config.num_chains, self.num_bits)
            self.register_buffer("hot_chains", hot)
            self.per_process_buffers += ("hot_chains",)
        self._before: Tensor | None = None  # chains before the last sweeps
        self._started = False
        self._cached: tuple[Boltzmann, tuple[int, ...], LogPartition] | None = None  # of which parameters and sizes

    def boltzmann(self) -> Boltzmann:
        """The present parameters, detached."""
        return Boltzmann(*(parameter.detach() for parameter in self._boltzmann_with_gradient()))

    def _boltzmann_with_gradient(self) -> Boltzmann:
        """The present parameters, through which gradients go."""
        return Boltzmann(*(p.to(self.energy_dtype) for p in (self.weight, self.left_bias, self.right_bias)))

    # Training
    # --------------------------------------------------------------------------------------------

    def energy(self, left: Tensor, right: Tensor) -> Tensor:
        with torch.autocast(left.device.type, enabled=False):
            return self._boltzmann_with_gradient().energy(left.to(self.energy_dtype), right.to(self.energy_dtype))

    def log_partition_loss(self) -> Tensor:
        """A scalar of value 0 whose gradient estimates that of log Z.

        Moves this process's chains by `num_sweeps` sweeps, in place, with noise of torch's global generator.
        """
        negative_energy = self._negative_phase()
        return negative_energy - negative_energy.detach()

    def forward(self, codes: Codes, labels: Tensor | None = None) -> dict[str, Tensor]:
        """The mean energy of the codes less that of the chains, in nats per code.

        Its gradient estimates that of the negative log-likelihood, but its value is not one: it is near 0 where codes
        and chains are alike, and far below where the chains do not follow. For the likelihood there is `log_prob`.
        """
        self.check_inputs(codes, labels)
        energy_gap = self.energy(*self.sides(codes)).mean() + self._negative_phase()
        return {"energy_gap": energy_gap / self.spec.length}

    def _negative_phase(self) -> Tensor:
        """Minus the mean energy of the chains, after they have moved; differentiable in the parameters."""
        with torch.autocast(self.chains.device.type, enabled=False):
            with torch.no_grad():
                parameters = self.boltzmann()
                left = self._move_chains(parameters)
                # Rao-Blackwell: the mean of right given left has less variance than right
                right = torch.addmm(parameters.right_bias, left, parameters.weight).sigmoid_()
                products, left, right = left.T @ right / len(left), left.mean(0), right.mean(0)
            weight, left_bias, right_bias = self._boltzmann_with_gradient()
            return (weight * products).sum() + left_bias @ left + right_bias @ right

    def _move_chains(self, parameters: Boltzmann) -> Tensor:
        """The left states (num_chains, n1) after one training step's sweeps; never compiled.

        That keeps torch's own random numbers, and nothing is lost: the time is in matrix products.
        """
        # As a decorator it would import torch's compiler, which takes a second, together with this package
        return torch.compiler.disable(self._sweep_chains)(parameters)

    def _sweep_chains(self, parameters: Boltzmann) -> Tensor:
        if not self._started:  # asked once: a device would have to be waited for each time
            if self.num_updates == 0:
                self.start_chains()  # not at construction, so that each process starts its own
            self._started = True
        sampler, self._before = self.config.sampler, self.chains.clone()
        if sampler == "parallel_tempering":
            gibbs = self._tempered_sweeps(parameters)
            states = torch.cat([gibbs.left, gibbs.right], dim=1).unflatten(0, (-1, len(self.chains)))
            self.hot_chains.copy_(states[:-1])
            self.chains.copy_(states[-1])
        else:
            left, right = self._chain_sides(self.chains)
            if sampler == "population_annealing":
                old = Boltzmann(*(getattr(self, f"old_{name}").to(left.dtype) for name in Boltzmann._fields))
                left, right, _ = reweight_population(left, right, old, parameters)
                self._remember(parameters)
                # rows that resampling shifted have not mixed
                self._before = torch.cat([left, right], dim=1).to(self.chains.dtype)
            gibbs = BlockGibbs(left, right)
            gibbs.sweep(parameters, self.config.num_sweeps)
            self.chains.copy_(torch.cat([gibbs.left, gibbs.right], dim=1))
        self.num_updates += 1
        return gibbs.left[-len(self.chains) :]

    def _tempered_sweeps(self, parameters: Boltzmann) -> BlockGibbs:
        """Sweeps of all temperatures, the last of which is 1, with exchanges between neighbours after each."""
        num_temperatures, num_chains = self.config.num_temperatures, self.config.num_chains
        times = torch.linspace(0, 1, num_temperatures, dtype=self.energy_dtype, device=self.chains.device)
        left, right = self._chain_sides(torch.cat([self.hot_chains, self.chains[None]]).flatten(0, 1))
        gibbs = BlockGibbs(left, right, inverse_temperatures=times.repeat_interleave(num_chains)[:, None])
        sides = (left.unflatten(0, (num_temperatures, -1)), right.unflatten(0, (num_temperatures, -1)))
        first = int(self.num_updates) % 2  # alternates also where a step is one sweep
        for sweep in range(self.config.num_sweeps):
            gibbs.sweep(parameters)
            exchange_temperatures(*sides, parameters, times, first=(first + sweep) % 2)
        return gibbs

    def _remember(self, parameters: Boltzmann) -> None:
        for name, parameter in parameters._asdict().items():
            getattr(self, f"old_{name}").copy_(parameter)

    def _chain_sides(self, states: Tensor) -> tuple[Tensor, Tensor]:
        left, right = states.to(self.energy_dtype).split([self.num_left, self.num_right], dim=1)
        return left.contiguous(), right.contiguous()

    @property
    def autocorrelation(self) -> float:
        """Correlation of the chains' states before and after the last sweeps, over all units, about their mean states.

        0 where as many bits changed as between independent states, 1 where none did, also if no unit varies at all;
        NaN before the first sweeps.
        """
        if self._before is None:
            return math.nan
        means = torch.cat([self._before, self.chains]).float().mean(0)
        independent = (2 * means * (1 - means)).sum().item()  # bits of a chain that would change
        changed = (self._before != self.chains).sum().item() / len(self.chains)
        return 1 - changed / independent if changed else 1.0

    @torch.no_grad()
    def start_chains(self, codes: Codes | None = None) -> None:
        """Puts the chains on the given codes, repeated or cut to their number, or on random bits.

        Random bits come from torch's global generator. The first training step starts from such ones, unless codes were
        given before it.

        Raises:
            ValueError: codes of no image, or of another code space.
        """
        self._before = None
        if codes is None:
            self.chains.random_(2)
            if self.config.sampler == "population_annealing":
                self._remember(self.boltzmann().scaled(0))
        else:
            self.spec.check(codes)
            bits = codes_to_bits(self.spec, codes)
            if not len(bits):
                raise ValueError("codes of at least one image are needed to start chains on, got none")
            self.chains.copy_(bits[torch.arange(len(self.chains), device=bits.device) % len(bits)])
            self.num_updates.clamp_(min=1)  # the first step is to go on from here
            if self.config.sampler == "population_annealing":
                self._remember(self.boltzmann())
        if self.config.sampler == "parallel_tempering":
            self.hot_chains.random_(2)

    def complaints(self) -> dict[str, str]:
        """What is wrong with the chains of the last step, the weights and the last estimate of log Z, by subject."""
        found = {}
        if self.autocorrelation > FROZEN_AUTOCORRELATION:
            found["chains"] = (
                f"the RBM's chains are frozen: over {self.config.num_sweeps} sweeps their states keep a correlation of "
                f"{self.autocorrelation:.3f}, so that the gradient of log Z is wrong; raise num_sweeps, lower the "
                "learning rate of the RBM, decay its weights, or take sampler 'parallel_tempering'"
            )
        largest = self.weight.detach().abs().max().item()
        if largest > LARGEST_WEIGHT:
            found["weights"] = (
                f"the largest weight of the RBM is {largest:.1f} nats, more than {LARGEST_WEIGHT:g}: chains cross such "
                "a bond once in e^|W| sweeps; decay the weights of the RBM or lower its learning rate"
            )
        if self._cached is not None and not self._cached[-1].agree:
            estimate = self._cached[-1]
            found["log Z"] = (
                f"the estimates of log Z disagree: {estimate.lower:.2f} and {estimate.upper:.2f} nats; likelihoods are "
                "not to be trusted; raise ais_temperatures, ais_chains or burn_in"
            )
        return found

    # Likelihood
    # --------------------------------------------------------------------------------------------

    def log_prob(self, codes: Codes, labels: Tensor | None = None) -> Tensor:
        """log p(codes) in nats (B,), by the value of `log_partition`, through which no gradient goes."""
        self.check_inputs(codes, labels)
        return -self.energy(*self.sides(codes)) - self.log_partition().value

    @property
    def estimates_log_partition(self) -> bool:
        """Whether log Z is estimated, because both sides have too many units for a sum over their states."""
        return min(self.num_left, self.num_right) > LARGEST_SUM

    @torch.no_grad()
    def log_partition(self, callback: Callable[[int, int], None] = silent) -> LogPartition:
        """log Z of the present parameters, computed anew only where they or an estimate's sizes have changed.

        Estimates take seconds, in which callback(done, total) is called as they advance. They use a seed of their own
        and the present chains, without moving them.

        Raises:
            ValueError: a size of an estimate that was set below its least.
        """
        check_sizes(self)
        parameters = self.boltzmann()
        exact = not self.estimates_log_partition
        sizes = () if exact else (self.burn_in, self.ais_chains, self.ais_temperatures)
        if self._cached is None or self._cached[1] != sizes or not _equal(parameters, self._cached[0]):
            with torch.autocast(self.weight.device.type, enabled=False):
                value = (
                    exact_log_partition(parameters) if exact else self._estimated_log_partition(parameters, callback)
                )
            self._cached = Boltzmann(*(p.clone() for p in parameters)), sizes, value
        return self._cached[-1]

    def _estimated_log_partition(self, parameters: Boltzmann, callback: Callable[[int, int], None]) -> LogPartition:
        generator = torch.Generator(self.chains.device).manual_seed(0)
        rows = torch.arange(self.ais_chains, device=self.chains.device) % len(self.chains)
        gibbs = BlockGibbs(*self._chain_sides(self.chains[rows]), generator=generator)
        gibbs.sweep(parameters, self.burn_in)
        return estimated_log_partition(
            parameters,
            gibbs.left,
            gibbs.right,
            num_temperatures=self.ais_temperatures,
            generator=generator,
            callback=callback,
        )

    # Sampling
    # --------------------------------------------------------------------------------------------

    def _sample(self, num_samples, labels, options, noise, given, callback) -> Codes:
        parameters = self.boltzmann()
        if not all(parameter.isfinite().all() for parameter in parameters):
            raise ValueError(NOT_NUMBERS)
        weight, left_bias, right_bias = parameters.scaled(1 / max(options.temperature, COLDEST))
        start = (noise.uniform() * len(self.chains)).long().clamp(max=len(self.chains) - 1)
        bits = self.chains[start].to(self.energy_dtype)
        clamped = torch.zeros_like(bits)
        if given is not None:
            fixed, known = codes_to_bits(self.spec, given[0]).to(self.energy_dtype), mask_to_bits(self.spec, given[1])
            bits = torch.where(known, fixed, bits)
            clamped = torch.where(known, (2 * fixed - 1) * torch.inf, clamped)  # logits that leave no choice
        sizes = [self.num_left, self.num_right]
        (left, right), (clamped_left, clamped_right) = bits.split(sizes, dim=1), clamped.split(sizes, dim=1)
        with torch.autocast(bits.device.type, enabled=False):
            for sweep in range(self.burn_in):
                if sweep % SWEEPS_OF_NOISE == 0:
                    uniform = noise.uniform(min(SWEEPS_OF_NOISE, self.burn_in - sweep), self.num_bits)
                for_left, for_right = uniform[:, sweep % SWEEPS_OF_NOISE].split(sizes, dim=1)
                right = (for_right < (left @ weight + right_bias + clamped_right).sigmoid()).to(self.energy_dtype)
                left = (for_left < (right @ weight.T + left_bias + clamped_left).sigmoid()).to(self.energy_dtype)
                callback(sweep + 1, self.burn_in)
        return bits_to_codes(self.spec, torch.cat([left, right], dim=1))

    def _check_options(self, options) -> None:
        super()._check_options(options)
        if options.temperature == 0:
            raise ValueError(
                "RBM cannot honour temperature 0: chains do not find the most probable codes; give one above 0, "
                "or search with an annealing sampler"
            )


def _random_bits(*shape: int) -> Tensor:
    return torch.randint(2, shape, dtype=torch.uint8)


def _equal(one: Boltzmann, other: Boltzmann) -> bool:
    return all(a.device == b.device and a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other))
