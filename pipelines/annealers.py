"""Boltzmann priors for annealing samplers, classical or quantum: binary quadratic models of `dimod`, and back."""

import torch

from pipelines.checkpoint import uncompiled
from prior.base import Codes
from prior.bits import bits_to_codes
from prior.rbm import RBM


def binary_quadratic_model(rbm: RBM):
    """The RBM's energy as a `dimod.BinaryQuadraticModel` over the variables 0 ... n - 1, the bits in their order.

    Left bits come first. Energies are in nats, equal to `rbm.energy`, so a sampler at inverse temperature 1 draws from
    the prior. There are couplings between the two sides alone, and none where a weight is 0.

    Raises:
        ValueError: another prior than an RBM, or dimod is not installed.
    """
    try:
        import dimod  # an extra, and only needed here
    except ModuleNotFoundError as error:
        raise ValueError("annealing samplers need dimod: pip install 'tessera-codes[annealing]'") from error
    rbm = uncompiled(rbm)
    if not isinstance(rbm, RBM):
        raise ValueError(
            f"annealers are for Boltzmann machines, the prior 'rbm', but this prior is {type(rbm).__name__}"
        )
    weight, left_bias, right_bias = (parameter.double().cpu() for parameter in rbm.boltzmann())
    linear = dict(enumerate((-torch.cat([left_bias, right_bias])).tolist()))
    coupled = weight.nonzero().tolist()
    quadratic = {(left, rbm.num_left + right): -weight[left, right].item() for left, right in coupled}
    return dimod.BinaryQuadraticModel(linear, quadratic, 0.0, dimod.BINARY)


def sample_set_to_codes(rbm: RBM, sample_set) -> Codes:
    """Codes of a `dimod.SampleSet` of `binary_quadratic_model(rbm)`: one row per read, in the order of the set.

    Raises:
        ValueError: the samples are not of the RBM's bits.
    """
    if set(sample_set.variables) != set(range(rbm.num_bits)):
        raise ValueError(
            f"the samples have {len(sample_set.variables)} variables, the RBM has the bits 0 to {rbm.num_bits - 1}; "
            "give samples of its binary_quadratic_model"
        )
    samples = sample_set.change_vartype("BINARY", inplace=False)
    columns = [samples.variables.index(bit) for bit in range(rbm.num_bits)]
    bits = torch.from_numpy(samples.record.sample[:, columns])
    repeats = torch.from_numpy(samples.record.num_occurrences.copy()).long()
    return bits_to_codes(rbm.spec, bits.repeat_interleave(repeats, dim=0))


def sample_with(sampler, rbm: RBM, num_samples: int, **options) -> Codes:
    """Draws codes of the prior with a sampler of `dimod`'s interface.

    For the distribution of the prior itself, the sampler has to end at inverse temperature 1, for example
    `dwave.samplers.SimulatedAnnealingSampler` with beta_range = (0.01, 1.0); a larger one favours probable codes, as a
    temperature below 1 does.

    Args:
        sampler: whose `sample(model, num_reads=..., **options)` gives a `dimod.SampleSet`.
        rbm: the prior.
        num_samples: B.
        options: the sampler's own, such as seed, num_sweeps and beta_range.
    Returns:
        one int64 tensor (B, *shape) per level, on the CPU.
    Raises:
        ValueError: an option that the sampler does not have, a sampler of another number of reads, or no dimod.
    """
    name, known = type(sampler).__name__, set(sampler.parameters)
    unknown = sorted({"num_reads", *options} - known)
    if unknown:
        raise ValueError(f"{name} has no option {', '.join(unknown)}; it has {', '.join(sorted(known)) or 'none'}")
    codes = sample_set_to_codes(rbm, sampler.sample(binary_quadratic_model(rbm), num_reads=num_samples, **options))
    if len(codes[0]) != num_samples:
        raise ValueError(f"{name} gave {len(codes[0])} samples, {num_samples} were asked for")
    return codes


def most_probable_codes(sampler, rbm: RBM, **options) -> Codes:
    """The codes (1, *shape) of lowest energy that a sampler of `dimod`'s interface finds; the mode, if it is exact."""
    found = sampler.sample(binary_quadratic_model(rbm), **options).slice(1)  # in the order of their energies
    return tuple(code[:1] for code in sample_set_to_codes(rbm, found))
