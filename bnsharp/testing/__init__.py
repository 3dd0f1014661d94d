"""A conformance kit for measures, geometries and regularisers of one's own: Hypothesis strategies and named checks."""

from bnsharp.testing.check import Check, CheckFailed, UnexpectedPass
from bnsharp.testing.geometry_checks import check_geometry
from bnsharp.testing.measure_checks import check_measure
from bnsharp.testing.networks import Network, network
from bnsharp.testing.regularizer_checks import check_regularizer
from bnsharp.testing.strategies import (
    Quadratic,
    Transform,
    batches,
    networks,
    quadratics,
    scale_factors,
    transformations,
)

__all__ = [
    "Check", "CheckFailed", "Network", "Quadratic", "Transform", "UnexpectedPass", "batches", "check_geometry",
    "check_measure", "check_regularizer", "network", "networks", "quadratics", "scale_factors", "transformations",
]
