"""Ranks of a launch agree on a name, whatever earlier launches left in the store."""

import datetime
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store

from iomm.parallel.launch_id import agree_on_launch

PATIENCE = datetime.timedelta(seconds=20)
AT_ONCE = datetime.timedelta(seconds=0.05)


def launch(store: Store, ranks: int) -> set[str]:
    with ThreadPoolExecutor(ranks) as pool:
        calls = [pool.submit(agree_on_launch, store, rank, ranks, PATIENCE) for rank in range(ranks)]
        return {call.result() for call in calls}


def test_all_ranks_have_one_name_and_every_launch_another():
    store = HashStore()
    names = [launch(store, ranks) for ranks in (3, 3, 2, 4, 1)]
    assert all(len(name) == 1 for name in names)
    assert len(set.union(*names)) == len(names)


def test_what_a_killed_rank_left_behind_is_answered_and_does_not_count():
    store = HashStore()
    with pytest.raises(dist.DistStoreError):
        agree_on_launch(store, 1, 2, AT_ONCE)  # its hello stays
    with pytest.raises(TimeoutError, match="ranks 1 of 2 did not come within 0.05 s"):
        agree_on_launch(store, 0, 2, AT_ONCE)
    assert len(launch(store, 2)) == 1
