"""The S3 server that the tests of this folder share, and its environment."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from infra import remote
from tests.s3_server import FaultyProxy, s3_server


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def proxy(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """The server behind a proxy, as this process's S3; waits between attempts are short."""
    import s3fs

    with FaultyProxy(s3_endpoint) as proxy:
        for name, value in {
            "AWS_ENDPOINT_URL": proxy.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
        monkeypatch.setattr(remote, "LONGEST_WAIT", 0.02)
        remote._filesystem.cache_clear()
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
        remote._filesystem.cache_clear()
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(proxy: FaultyProxy, request: pytest.FixtureRequest) -> str:
    """``s3://`` and a bucket of this test's own."""
    import boto3

    name = f"test-{abs(hash(request.node.nodeid)) % 10**12}"
    boto3.client("s3").create_bucket(Bucket=name)
    proxy.seen.clear()
    return f"s3://{name}"
