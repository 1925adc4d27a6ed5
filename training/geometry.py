from .telemetry import Geometry as Geometry
