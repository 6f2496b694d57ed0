"""What a plan of training and one of decoding both say of time."""


class Roofline:
    """Time of something whose computing and reading overlap, and whose network waits."""

    @property
    def roofline(self) -> dict[str, float]:
        """Seconds of `compute`, `memory` and `network`, each alone at its peak rate."""
        raise NotImplementedError

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        roofline = self.roofline
        return max(roofline, key=roofline.__getitem__)

    @property
    def seconds(self) -> float:
        """Of all of it when nothing hides the network: the pessimistic end."""
        roofline = self.roofline
        return max(roofline["compute"], roofline["memory"]) + roofline["network"]
