"""Texts that name a place: endpoints of object stores, and places of checkpoints, texts and run
roots.

None may carry a user's name and password. The configuration is kept in the plan and shown in the
report, and credentials have places of their own: the environment, or a login file.
"""

import re
from typing import Annotated, NoReturn

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

USER_INFO_ERROR = "user_info"
"""Type of the error. Whoever words it leaves out what was found, because that is a secret."""

PLACE_WITH_USER = re.compile(r"[A-Za-z][\w+.-]*://[^/@]*:[^/]*@")
"""scheme://user:password@ before the first slash. An @ alone is a revision, as in hf://name@v1."""


def refuse_user_info(how: str) -> NoReturn:
    raise PydanticCustomError(
        USER_INFO_ERROR,
        "expected {how} without a user's name and password in it, found some (not shown here); put"
        " credentials into the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, HF_TOKEN)",
        {"how": how},
    )


def without_user(value: object) -> object:
    """A place, as it is. Refused before its type is looked at, whose error would show it."""
    if PLACE_WITH_USER.search(str(value)):
        refuse_user_info("a place")
    return value


def without_at(value: object) -> object:
    """An endpoint, as it is. A password may hold a slash by mistake, and no address of a server
    needs an @."""
    if "@" in str(value):
        refuse_user_info("a URL such as http://host:9000")
    return value


EndpointUrl = Annotated[str | None, BeforeValidator(without_at)]
Place = Annotated[str, BeforeValidator(without_user)]
OptionalPlace = Annotated[str | None, BeforeValidator(without_user)]
