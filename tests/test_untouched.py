import pytest, warnings
from lightning_subspace import SubspaceMonitor
from tests.modules import PROJECTS, differences, train

def monitor(**kw):
    return SubspaceMonitor(**{"k": 2, "every_n_steps": 4, "max_overhead": None, "sample": 16, "gradient_sample": 24, "on_failure": "raise", **kw})

@pytest.mark.parametrize("name", PROJECTS)
@pytest.mark.parametrize("kw", [dict(sample=16), dict(sample="current")], ids=str)
def test_identity(name, kw, tmp_path):
    a = train(PROJECTS[name], tmp_path / "a")
    m = monitor(**kw)
    with warnings.catch_warnings():
        if name in ("Teacher", "Clamped", "Toggled"):
            warnings.filterwarnings("ignore", "SubspaceMonitor:")
        b = train(PROJECTS[name], tmp_path / "b", m)
    d = differences(a, b)
    print(len(m.history), [len(r.metrics) for r in m.history], len(a))
    assert not d, d[:10]
    assert len(m.history) >= 3
