import subprocess
import sys

_REPORT = """
import sys, time
start = time.process_time()
import skyrl_gym, skyrl_gym.metrics, skyrl_gym.check
print(time.process_time() - start)
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


def test_importing_skyrl_gym_is_quick_and_loads_no_heavy_package():
    result = subprocess.run([sys.executable, "-c", _REPORT], capture_output=True, text=True, check=True)
    seconds, modules = result.stdout.splitlines()
    assert float(seconds) < 1.0  # of a processor: measured 0.04 to 0.1; the promise is 0.3
    assert not {"torch", "ray", "numpy", "pandas", "requests", "transformers"} & set(modules.split())


def test_importing_skyrl_gym_does_not_import_the_environments():
    code = "import skyrl_gym, sys; print(*(name for name in sys.modules if name.endswith('.env')))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
