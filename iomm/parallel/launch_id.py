"""A name for this launch that all its ranks know and no earlier launch had.

torchrun's agents keep one key-value store for all restarts of a job, and what dead ranks wrote there stays:
an address that nobody listens at, an answer to a question of an earlier launch. (torch 2.14 itself expects a
new store for every restart.) The number of restarts is no name either: agents of different nodes may count
differently. So the ranks agree on one, by keys that nobody could have written before:

    rank r   hello_r = H, a number of its own         waits for reply_H, which only a living rank 0 writes
    rank 0   reply_H = the name, for every H it sees   until every rank has written came_NAME_r
"""

import datetime
import time
import uuid

from torch._C._distributed_c10d import Store

_ROUND_S = 0.02


def agree_on_launch(store: Store, rank: int, world_size: int, patience: datetime.timedelta) -> str:
    """The name of this launch; all ranks call.

    Args:
        store: may hold whatever earlier launches left there.
        patience: how long ranks wait for each other.

    Raises:
        TimeoutError: on rank 0: names the ranks that did not come.
        torch.distributed.DistStoreError: on the others: rank 0 did not come.
    """
    if rank != 0:
        hello = uuid.uuid4().hex
        store.set(f"hello_{rank}", hello)
        store.wait([f"reply_{hello}"], patience)
        name = store.get(f"reply_{hello}").decode()
        store.set(f"came_{name}_{rank}", "")
        return name
    name, deadline = uuid.uuid4().hex, time.monotonic() + patience.total_seconds()
    missing, answered = set(range(1, world_size)), set[bytes]()
    while missing:
        said = [other for other in sorted(missing) if store.check([f"hello_{other}"])]
        for hello in store.multi_get([f"hello_{other}" for other in said]):
            if hello not in answered:
                answered.add(hello)
                store.set(f"reply_{hello.decode()}", name)
        missing = {other for other in missing if not store.check([f"came_{name}_{other}"])}
        if missing and time.monotonic() > deadline:
            late = ", ".join(map(str, sorted(missing)))
            raise TimeoutError(
                f"ranks {late} of {world_size} did not come within {patience.total_seconds():g} s. "
                "Look at their nodes and logs, or launch without them."
            )
        if missing:
            time.sleep(_ROUND_S)
    return name
