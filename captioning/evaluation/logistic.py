"""Logistic regression on a few features, fitted exactly: Newton's method on standardised features.

Letters: N examples, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RIDGE = 1.0  # penalty on squared weights of standardised features: as strong as a few examples
MAX_STEPS = 50
TOLERANCE = 1e-9


@dataclass(frozen=True)
class LogisticModel:
    """p(event) = sigmoid(bias + weights . (features - mean) / scale)."""

    mean: np.ndarray  # (F,) float64, of the features it was fitted on
    scale: np.ndarray  # (F,) float64, their standard deviation; 1 for a constant feature
    weights: np.ndarray  # (F,) float64
    bias: float

    @classmethod
    def fit(cls, features: np.ndarray, events: np.ndarray) -> LogisticModel:
        """Fit to examples: features (N, F) float64, events (N,) bool.

        Maximises the likelihood with a ridge penalty, which keeps weights finite where the features separate the events
        (le Cessie and van Houwelingen 1992, https://doi.org/10.2307/2347628).
        """
        mean = features.mean(0)
        spread = features.std(0)
        scale = np.where(spread > 0, spread, 1.0)
        inputs = np.column_stack([(features - mean) / scale, np.ones(len(features))])  # (N, F + 1)
        penalty = np.append(np.full(features.shape[1], RIDGE), 1e-6)  # nearly none on the bias
        weights = np.zeros(inputs.shape[1])
        for _ in range(MAX_STEPS):
            probabilities = sigmoid(inputs @ weights)
            gradient = inputs.T @ (probabilities - events) + penalty * weights
            curvature = (inputs * (probabilities * (1 - probabilities))[:, None]).T @ inputs + np.diag(penalty)
            step = np.linalg.solve(curvature, gradient)
            weights = weights - step
            if np.abs(step).max() < TOLERANCE:
                break
        return cls(mean, scale, weights[:-1], float(weights[-1]))

    def predict(self, features: np.ndarray) -> np.ndarray:
        """The probability of the event for features (..., F): (...) float64."""
        return sigmoid(self.bias + (features - self.mean) / self.scale @ self.weights)

    def to_dict(self) -> dict:
        """Plain data, for a checkpoint."""
        return {
            "mean": self.mean.tolist(),
            "scale": self.scale.tolist(),
            "weights": self.weights.tolist(),
            "bias": self.bias,
        }

    @classmethod
    def from_dict(cls, data: dict) -> LogisticModel:
        """The inverse of `to_dict`."""
        mean, scale, weights = (np.array(data[name], float) for name in ("mean", "scale", "weights"))
        return cls(mean, scale, weights, float(data["bias"]))


def sigmoid(values: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * values))
