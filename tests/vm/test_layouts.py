"""acctd on kernels whose cgroups are laid out in ways that this host's are not: v2 alone, v1 joined, and between."""

import pytest

from tests.vm import guest, lanes
from tests.vm.conftest import Guests

# Where a guest can run it must: there, whatever is missing is a failure and not a skip.
pytestmark = pytest.mark.skipif(guest.runnable_here() is not None, reason=str(guest.runnable_here()))


@pytest.mark.parametrize(("layout", "name"), [(layout, name) for layout in lanes.LANES for name in lanes.names(layout)])
def test_in_guest(guests: Guests, layout: str, name: str) -> None:
    guests.check(layout, name)
