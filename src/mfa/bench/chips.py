"""Apple GPUs, as far as the cost model needs them."""

from typing import NamedTuple


class Chip(NamedTuple):
    """Clocks are the GPU's; a core does 128 float32 FMAs per clock on all of these."""

    name: str
    family: str  # apple7 ...
    cores: int
    ghz: float
    bandwidth: float  # GB/s

    @property
    def peak(self) -> float:
        """Operations per second of float16 products: as many as of float32, or on the matrix unit four times that."""
        return self.cores * (1024 if self.has_unit else 256) * self.ghz * 1e9

    @property
    def has_unit(self) -> bool:
        return self.family == "apple10"

    @property
    def has_side_pipe(self) -> bool:
        """Whether integers, conversions and memory instructions issue beside float32 (M3 and later)."""
        return self.family in ("apple9", "apple10")


# Cores of the largest variant. The clocks of M4 are unsure; that of M5 is what 33.5 TFLOP/s of an M5 Pro's 20 cores
# imply, which somebody measured.
CHIPS = {
    "m1": Chip("M1", "apple7", 8, 1.278, 68),
    "m1-max": Chip("M1 Max", "apple7", 32, 1.296, 400),
    "m2-max": Chip("M2 Max", "apple8", 38, 1.398, 400),
    "m3-max": Chip("M3 Max", "apple9", 40, 1.398, 400),
    "m3-ultra": Chip("M3 Ultra", "apple9", 80, 1.398, 800),
    "m4-max": Chip("M4 Max", "apple9", 40, 1.68, 546),
    "m5": Chip("M5", "apple10", 10, 1.63, 153),
    "m5-pro": Chip("M5 Pro", "apple10", 20, 1.63, 307),
    "m5-max": Chip("M5 Max", "apple10", 40, 1.63, 614),
}
