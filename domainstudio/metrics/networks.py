"""Feature networks by name. A new one is a class with `FeatureNetwork`'s interface and a line in `_NETWORKS`.

Outside of this package `register_network` makes a name a value of `evaluate.features` in params.yaml:

    register_network("my-network", MyNetwork)

To get Inception's FID, or LPIPS itself, wrap their networks so: `pooled` is what the Fréchet and kernel
distances, precision and recall are computed from; `perceptual` is any embedding whose squared Euclidean
distance is the perceptual distance (for LPIPS: scale each channel of `perceptual_rows` by the square root of
its learned weight). Figures from different networks are never comparable.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from domainstudio.errors import ConfigError
from domainstudio.metrics.features import FeatureNetwork


def _efficientnet_lite0() -> FeatureNetwork:
    from domainstudio.metrics.efficientnet import EfficientNetLite0

    return EfficientNetLite0()


_NETWORKS: dict[str, Callable[[], FeatureNetwork]] = {"efficientnet-lite0": _efficientnet_lite0}


def register_network(name: str, factory: Callable[[], FeatureNetwork]) -> None:
    """Make `factory` available as `load_network(name)` and as a value of `evaluate.features`."""
    _NETWORKS[name] = factory
    load_network.cache_clear()


@cache
def load_network(name: str) -> FeatureNetwork:
    """Return the network of that name, built once per process.

    Raises:
        ConfigError: no network has that name.
        MissingExtraError: the network's packages are not installed.
    """
    if name not in _NETWORKS:
        raise ConfigError(f"evaluate.features is {name!r}; there are {sorted(_NETWORKS)}")
    return _NETWORKS[name]()
