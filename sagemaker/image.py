"""The source and the image of a job: files in a tar, a name by the hash of their content, Docker and ECR."""

import base64
import hashlib
import io
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_FILES = (
    "vla_foundry",
    "config_presets",
    "pyproject.toml",
    "requirements.lock",
    "sagemaker/Dockerfile",
    "sagemaker/entry.py",
)
_TAG_LETTERS = 16
_MIN_SECRET = 8


def list_source(include: list[str]) -> dict[str, Path]:
    """Return the files of the image by their names in it: the package's, and those that the user adds.

    Raises:
        ValueError: this is no Git checkout, or what is to be added is not below the working directory.
        FileNotFoundError: what is to be added does not exist.
    """
    # what Git ignores, secrets.env first of all, stays here
    words = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *_FILES]
    try:
        listed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        raise ValueError(
            f"{ROOT} is no Git checkout, which says what belongs to the image. Clone it with git."
        ) from None
    names = [name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    files = {name: ROOT / name for name in names}
    for given in include:
        path = Path(given)
        if not path.exists():
            raise FileNotFoundError(f"sagemaker.include: {given} does not exist.")
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"sagemaker.include '{given}' must be below the working directory, by a relative path.")
        found = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())
        if secret := next((item for item in found if item.name.endswith(".env")), None):
            raise ValueError(f"sagemaker.include '{given}' brings {secret}. Files of secrets stay here.")
        added = {str(item): item for item in found if "__pycache__" not in item.parts}
        if both := sorted(added.keys() & files.keys()):
            raise ValueError(f"sagemaker.include '{given}' replaces {both[0]} of the package. Rename it.")
        files |= added
    return files


def pack(files: dict[str, Path], secrets: dict[str, str]) -> bytes:
    """Return the files as a tar that depends on nothing but their names and content.

    Raises:
        ValueError: a file holds a secret.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, path in sorted(files.items()):
            content = path.read_bytes()
            refuse_secrets(content, secrets, str(path))
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.mode = 0o755 if os.access(path, os.X_OK) else 0o644
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def refuse_secrets(content: bytes, secrets: dict[str, str], where: str) -> None:
    """Check that no secret's value stands in what leaves this machine in the clear.

    Raises:
        ValueError: one does; its name is told, not its value.
    """
    for name, value in secrets.items():
        # a short value, such as "online", is none
        if len(value) >= _MIN_SECRET and value.encode() in content:
            raise ValueError(f"{where} holds the value of the secret {name}. Remove it there.")


def tag_of(source: bytes) -> str:
    """Return the tag of the image of a source tar."""
    return hashlib.sha256(source).hexdigest()[:_TAG_LETTERS]


def ensure_image(session: Any, uri: str, source: bytes) -> str:
    """Return the image's URI after building and pushing it, unless the registry has it.

    Args:
        session: a boto3 session in the image's region.
        uri: REGISTRY/REPOSITORY:TAG.
        source: the tar that the image is built from.

    Raises:
        ValueError: Docker is missing or fails.
    """
    ecr = session.client("ecr")
    registry, _, rest = uri.partition("/")
    repository, _, tag = rest.rpartition(":")
    try:
        ecr.describe_images(repositoryName=repository, imageIds=[{"imageTag": tag}])
        return f"{uri} is there already"
    except ecr.exceptions.RepositoryNotFoundException:
        ecr.create_repository(repositoryName=repository)
    except ecr.exceptions.ImageNotFoundException:
        pass
    build(uri, source)
    token = ecr.get_authorization_token()["authorizationData"][0]["authorizationToken"]
    user, _, password = base64.b64decode(token).decode().partition(":")
    _docker("login", "--username", user, "--password-stdin", registry, content=password.encode())
    _docker("push", uri)
    return f"{uri} was built and pushed"


def build(uri: str, source: bytes) -> None:
    """Build the image from the source tar, which is all that Docker sees."""
    _docker("build", "--platform", "linux/amd64", "--file", "sagemaker/Dockerfile", "--tag", uri, "-", content=source)


def _docker(*words: str, content: bytes = b"") -> None:
    try:
        code = subprocess.run(["docker", *words], input=content, check=False).returncode
    except FileNotFoundError:
        raise ValueError(
            "Docker is not installed, and the image must be built. Install it, or launch elsewhere."
        ) from None
    if code:
        raise ValueError(f"docker {words[0]} failed with exit code {code}; its own message stands above.")
