"""Whose an error is: parts that a user may have written are named."""

import pytest
import torch

from kd_mm.ops.problems import named


def test_an_error_that_names_nobody_gets_the_name_and_the_contract():
    with pytest.raises(ValueError, match=r"MyRegion fails: KeyError: 'a'\. It returns weights") as caught, named(
            'MyRegion', 'It returns weights'):
        dict()['a']
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize('error', [
    RuntimeError('MyRegion: the sizes differ'), torch.cuda.OutOfMemoryError('full'), KeyboardInterrupt()], ids=repr)
def test_one_that_says_it_is_left_and_so_is_what_no_part_can_help(error):
    with pytest.raises(type(error)) as caught, named('MyRegion', 'It returns weights'):
        raise error
    assert caught.value is error
