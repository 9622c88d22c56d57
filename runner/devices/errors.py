"""The errors of devices: each is a mistake in the code that uses one, and no correct code catches any.

RunnerError
└── DeviceMisuse            what no correct caller does
    ├── UnorderedAccess     two accesses of a buffer that no event orders
    ├── UnrecordedEvent     waiting for an event that was never recorded
    ├── ForeignBuffer       an event or a buffer that is not this device's
    ├── OutOfBounds         bytes that are not in a buffer
    └── Deadlock            queues that wait for what nobody will record
"""

from runner.errors import RunnerError


class DeviceMisuse(RunnerError):
    """A call that no correct user of a device makes."""


class UnorderedAccess(DeviceMisuse):
    """An access of a buffer that no event orders after an earlier one, where one of the two writes."""


class UnrecordedEvent(DeviceMisuse):
    """Waiting for an event that was never recorded, which on a GPU would not wait at all."""


class ForeignBuffer(DeviceMisuse):
    """An event or a buffer that is not this device's."""


class OutOfBounds(DeviceMisuse):
    """Bytes that are not in a buffer."""


class Deadlock(DeviceMisuse):
    """Queues that wait for events which nobody will record."""
