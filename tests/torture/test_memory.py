"""Memory does not grow with the photos but for their captions, in the commands themselves: see bench/memory.py."""

from tests.test_bench import bench

SLACK = 150e6  # bytes: a batch more or fewer under way
A_PHOTO = 4_000  # id, path and captions; its features would be 8,448


def test_a_photo_more_takes_the_room_of_its_captions_at_most(tmp_path, times, tally):
    memory, photos = bench("memory"), times(40, 50_000)
    few, many = (memory.measure(tmp_path, size) for size in (times(20, 2_000), photos))
    for command, taken in many.items():
        assert 0 < taken.own < few[command].own + SLACK + A_PHOTO * photos, command
    tally("photos whose features take no memory", photos)
    assert list(tmp_path.iterdir()) == []
