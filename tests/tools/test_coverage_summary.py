"""tools/dev/coverage_summary.py on a package of three files, measured for real."""

import subprocess
import sys

from stock import tool

TOOL = tool('coverage_summary')


def test_total_low_files_and_files_that_nothing_imports(tmp_path, capsys):
    package = tmp_path / 'sample'
    package.mkdir()
    (package / '__init__.py').write_text('')
    (package / 'half.py').write_text('def run(flag):\n    if flag:\n        return 1\n    return 2\n\n\nrun(True)\n')
    (package / 'never.py').write_text('A = 1\nB = 2\nC = 3\n')
    data = tmp_path / 'data'
    subprocess.run([sys.executable, '-m', 'coverage', 'run', f'--data-file={data}', '--source=sample', '-m',
                    'sample.half'], check=True, cwd=tmp_path)
    assert TOOL.main(['--data', str(data), '--package', str(package)]) == 0
    # half.py: 4 of 5 lines; never.py: none of 3.
    assert capsys.readouterr().out.splitlines() == [
        'coverage: 50.0 % of 8 lines in 3 files (aim: 95 %); 2 below 90 %:',
        '    0.0 %  sample/never.py: 1-3',
        '   80.0 %  sample/half.py: 4']


def test_without_data_it_says_how(tmp_path, capsys):
    assert TOOL.main(['--data', str(tmp_path / 'none')]) == 1
    assert 'run the tests with --cov first' in capsys.readouterr().err
