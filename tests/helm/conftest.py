import pytest

from tests.helm.charts import Helm


@pytest.fixture(params=["helm3", "helm4"])
def helm(request):
    return Helm(request.param)


@pytest.fixture
def helm4():
    return Helm("helm4")
