"""The base optimizers that the README lists, as DeepSpeed makes them."""

from __future__ import annotations

from tests.support.engines import Optimizer

ADAM = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}

OPTIMIZERS = {
    "AdamW": Optimizer(),
    "Adam": Optimizer("Adam", {**ADAM, "torch_adam": True, "adam_w_mode": False}),
    "FusedAdam": Optimizer("AdamW", ADAM),
    "FusedAdam-L2": Optimizer("Adam", {**ADAM, "adam_w_mode": False}),
    "SGD": Optimizer("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "Adagrad": Optimizer("Adagrad", ADAM),
    "RMSprop": Optimizer("RMSprop", {**ADAM, "momentum": 0.5}),
}
"""As DeepSpeed builds them without offload."""

OFFLOADED = {
    "DeepSpeedCPUAdam": Optimizer("AdamW", ADAM),
    "DeepSpeedCPUAdam-L2": Optimizer("Adam", {**ADAM, "adam_w_mode": False}),
    "DeepSpeedCPULion": Optimizer("Lion", {"lr": 1e-2, "weight_decay": 0.1}),
    "DeepSpeedCPUAdagrad": Optimizer("Adagrad", ADAM),
}
