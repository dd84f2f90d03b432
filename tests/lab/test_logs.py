"""What a training has left in its work dir."""

from kd_mm.lab.logs import last_checkpoint


def test_the_last_checkpoint_of_a_folder_that_was_moved(tmp_path):
    """The host notes a whole path, of where the folder was; what lies in this one counts."""
    old, new = tmp_path / 'old', tmp_path / 'new'
    for folder in (old, new):
        folder.mkdir()
        for name in ('epoch_9.pth', 'epoch_10.pth', 'epoch_11.pth', 'best_of_all.pth'):
            (folder / name).write_text('')
    assert last_checkpoint(new) == str(new / 'epoch_11.pth') and last_checkpoint(new, noted=True) is None
    (new / 'last_checkpoint').write_text(str(old / 'epoch_10.pth'))
    assert last_checkpoint(new) == last_checkpoint(new, noted=True) == str(new / 'epoch_10.pth')
    (new / 'epoch_10.pth').unlink()  # noted, and gone: the highest number is
    assert last_checkpoint(new, noted=True) == str(new / 'epoch_11.pth')
    assert last_checkpoint(tmp_path) is None
