"""Upload files to a repository on the Hugging Face Hub.

    name = create_repository("owner/name", is_private=False)
    url = upload_files(name, {"README.md": folder / "README.md"}, "Upload an adapter", is_loaded_file, report)

Files from earlier uploads, also from interrupted uploads, aren't sent again. The token is from `hf auth login` or
HF_TOKEN, and isn't stored.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from t5tune.compat.hub_patches import watch_requests_to_the_hub
from t5tune.errors import SettingsError, UploadError
from t5tune.file_names import MODEL_CARD_FILE
from t5tune.hub.download import describe, get_status
from t5tune.io.reasons import hide_queries
from t5tune.progress import Note, Report

SIGN_IN_HINT = "run `hf auth login` with a token that has write access, or set HF_TOKEN"


def create_repository(name: str, is_private: bool) -> str:
    """Create a repository for a model unless it exists, and return its full name.

    Args:
        name: `owner/name`, or `name` in the user's account.

    Raises:
        SettingsError: the Hub refuses the name or the access, or the repository is public although it must be private.
        UploadError: the Hub can't be reached.
    """
    from huggingface_hub import HfApi

    watch_requests_to_the_hub()
    asked, api = f"hub_model_id: {name}", HfApi()
    try:
        with _allow_missing():
            api.whoami()  # creating a repository that exists asks for no token
        # None: as the organization's settings say
        full_name = str(api.create_repo(name, private=is_private or None, exist_ok=True).repo_id)
        if "write" in inspect.signature(api.auth_check).parameters:
            with _allow_missing():
                api.auth_check(full_name, write=True)
        is_public = is_private and not api.repo_info(full_name).private
    except Exception as error:  # OSError, ValueError, and exceptions of the HTTP library of huggingface_hub
        raise _explain(asked, error) from error
    if is_public:
        problem = f"hub_private_repo: {full_name} already exists, and everyone can see it"
        raise SettingsError(problem, hint="make it private on its page, or leave out hub_private_repo")
    return full_name


@contextmanager
def _allow_missing() -> Iterator[None]:
    """Ignore a check that the server lacks, such as a mirror of the Hub: the commit will show what it allows."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        if get_status(error) != 404 or isinstance(error, errors.RepositoryNotFoundError):
            raise


def upload_files(
    name: str, files: Mapping[str, Path | bytes], message: str, is_replaced: Callable[[str], bool], report: Report
) -> str:
    """Upload files as one commit, and return the repository's URL.

    Args:
        files: path in the repository -> file or content.
        message: of the commit.
        is_replaced: whether to delete a file of the repository that isn't in `files`, since programs would load it with
            the new files or instead of them.

    Raises:
        SettingsError: the Hub doesn't accept the files, or doesn't let this user write there.
        UploadError: the Hub can't be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    watch_requests_to_the_hub()
    api = HfApi()
    try:
        others = [path for path in api.list_repo_files(name) if path not in files]
        stale = [path for path in others if is_replaced(path)]
        additions = [
            CommitOperationAdd(path, file if isinstance(file, bytes) else str(file)) for path, file in files.items()
        ]
        # one by one: for several files huggingface_hub starts threads, and a stopped process would wait for them
        for addition in additions:
            api.preupload_lfs_files(name, [addition])
        if stale:
            text = f"{name}: deleting replaced files: {', '.join(stale)}; earlier commits keep them"
            report(Note(text, warning=True))
        if MODEL_CARD_FILE in others:
            report(Note(f"{name}: its model card ({MODEL_CARD_FILE}) is kept, since the upload has none"))
        api.create_commit(name, [*map(CommitOperationDelete, stale), *additions], commit_message=message)
        return hide_queries(f"{api.endpoint}/{name}")
    except Exception as error:
        raise _explain(f"hub_model_id: {name}", error) from error


def _explain(asked: str, error: Exception) -> SettingsError | UploadError:
    """Turn an error of huggingface_hub into an error with the next step."""
    from huggingface_hub import errors

    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # it only says which file was being uploaded
    status, reason = get_status(error), describe(error)
    match error:
        case errors.HFValidationError():
            return SettingsError(f"{asked}: not a valid name on the Hub", hint="expected owner/name")
        case errors.LocalTokenNotFoundError():
            return SettingsError(f"{asked}: you aren't signed in", hint=SIGN_IN_HINT)
        case errors.RepositoryNotFoundError():
            return SettingsError(f"{asked}: no such repository, or you can't write to it", hint=SIGN_IN_HINT)
        case errors.OfflineModeIsEnabled():
            return UploadError(f"{asked}: HF_HUB_OFFLINE disables uploads", hint="unset HF_HUB_OFFLINE")
        case _ if status == 401:
            return SettingsError(f"{asked}: you aren't signed in, or the token isn't valid", hint=SIGN_IN_HINT)
        case _ if status == 403:
            return SettingsError(f"{asked}: you can't write to it: {reason}", hint=SIGN_IN_HINT)
        case _ if status is not None and 400 <= status < 500 and status not in (408, 429):
            return SettingsError(f"{asked}: the Hub refused the request: {reason}", hint="see the repository's page")
        case ValueError() if "metadata" in reason.lower():  # the Hub's check of the model card
            problem = f"{asked}: the Hub refuses the model card: {reason}"
            return SettingsError(problem, hint=f"correct its {MODEL_CARD_FILE}")
    return UploadError(f"{asked}: the upload failed: {reason}", hint="check the network connection, and try again")
