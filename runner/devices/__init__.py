"""The devices a model can be computed on, and which one is taken."""

from runner.errors import DeviceUnavailable

CPU = "cpu"


def choose_device(name: str) -> str:
    """Return the device to compute on for auto, cpu or cuda; raise DeviceUnavailable."""
    if name in ("auto", CPU):
        return CPU
    if name == "cuda":
        raise DeviceUnavailable(
            "device cuda: computing on GPUs comes with a later version; leave --device out (or say --device cpu) now"
        )
    raise DeviceUnavailable(f"device {name!r} is not known; auto, cpu and cuda are")
