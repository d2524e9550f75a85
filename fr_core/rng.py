"""Random numbers as pure functions of (seed, purpose, keys).

They never depend on the number of workers or on the order of calls.
"""

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def generator(seed: int, purpose: str, *keys: int) -> np.random.Generator:
    """Return a NumPy generator that only (seed, purpose, keys) determine."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, _number(purpose), *keys])))


def torch_seed(seed: int, purpose: str, *keys: int) -> int:
    """Return a 63-bit seed for ``torch.Generator.manual_seed``."""
    return int(generator(seed, purpose, *keys).integers(2**63))


def uniforms(seed: int, purpose: str, epoch: int, sample_ids: np.ndarray, count: int) -> np.ndarray:
    """Draw ``count`` uniform numbers in [0, 1) for each sample of a batch, in one vectorised call.

    The generator is counter-based: SplitMix64's finaliser (Steele et al., "Fast Splittable Pseudorandom Number
    Generators", OOPSLA 2014) over seed, purpose, epoch, sample id and counter. So a sample's numbers do not depend on
    its batch.

    Args:
        seed: seed of the run.
        purpose: what the numbers are for; each purpose has an independent stream.
        epoch: epoch of the run.
        sample_ids: int64 [B].
        count: numbers per sample.

    Returns:
        float64 [B, count].
    """
    with np.errstate(over="ignore"):
        stream = _mix(np.array([_number(purpose)], np.uint64) ^ _mix(np.array([seed], np.uint64)))
        stream = _mix(stream + np.uint64(epoch) * _GOLDEN)
        keys_B = _mix(np.asarray(sample_ids, np.int64).astype(np.uint64) + stream)
        counters = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        bits = _mix(keys_B[:, None] + counters[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normals(seed: int, purpose: str, epoch: int, sample_ids: np.ndarray) -> np.ndarray:
    """Draw a standard normal number for each sample of a batch: float64 [B]; see :func:`uniforms`.

    The transform is that of Box and Muller ("A Note on the Generation of Random Normal Deviates", 1958).
    """
    radius_B, turn_B = uniforms(seed, purpose, epoch, sample_ids, 2).T
    return np.sqrt(-2 * np.log1p(-radius_B)) * np.cos(2 * np.pi * turn_B)


def _mix(x: np.ndarray) -> np.ndarray:
    """Apply SplitMix64's finaliser to uint64 numbers."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _number(purpose: str) -> int:
    """Hash a purpose to 64 bits."""
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")
