import torch

from iomm.data.batch_memory import BatchMemory


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_memory_is_lent_again_when_nothing_refers_to_it():
    memory = BatchMemory(2)
    first = memory.empty((2, 3, 4, 5))
    assert (first.dtype, first.shape, first.is_contiguous()) == (torch.uint8, (2, 3, 4, 5), True)
    second = memory.empty((2, 3, 4, 5))
    where = address(second)
    assert where != address(first)
    del second
    assert address(memory.empty((2, 3, 4, 5))) == where


def test_a_view_keeps_memory_from_being_lent_again():
    memory = BatchMemory(1)
    whole = memory.empty((4, 8))
    whole.fill_(7)
    rows = whole.unbind(0)
    del whole
    assert address(memory.empty((4, 8))) != address(rows[0])
    assert rows[3].tolist() == [7] * 8


def test_a_smaller_batch_takes_a_larger_ones_memory_and_a_larger_one_does_not():
    memory = BatchMemory(2)
    large = memory.empty((100,))
    where = address(large)
    del large
    small = memory.empty((3, 5))
    assert (address(small), small.shape) == (where, (3, 5))
    del small
    larger = memory.empty((101,))
    assert larger.shape == (101,)
    assert len(memory._lent) <= 2


def test_no_more_blocks_are_kept_than_said():
    memory = BatchMemory(2)
    held = [memory.empty((size,)) for size in range(1, 9)]
    assert len({address(tensor) for tensor in held}) == 8
    del held
    for size in range(20, 40):
        memory.empty((size,))
    assert len(memory._lent) == 2
