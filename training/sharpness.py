from .telemetry import Sharpness as Sharpness
