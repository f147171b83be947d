"""Texts that name a place: endpoints of object stores, and places of checkpoints, texts and run
roots.

None may carry a user's name and password. The configuration is kept in the plan and shown in the
report, and credentials have places of their own: the environment, or a login file.
"""

import re
from typing import Annotated, NoReturn

from pydantic import AfterValidator, BeforeValidator
from pydantic_core import PydanticCustomError

from p48ray.errors import P48Error
from p48ray.store.open import SCHEMES, open_store, scheme_of, with_small_scheme

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


def sound_place(value: object) -> object:
    """A place with its scheme in small letters. One that no store could be opened at is refused;
    opening asks nobody. Plain paths and unknown schemes are looked at by whoever opens them."""
    if not isinstance(value, str):
        return value
    place, scheme = with_small_scheme(value), scheme_of(value)
    if not scheme.is_path and scheme.name in SCHEMES:
        try:
            open_store(place)
        except P48Error as error:
            raise ValueError(str(error)) from None
    return place


EndpointUrl = Annotated[str | None, BeforeValidator(without_at)]
Place = Annotated[str, AfterValidator(sound_place), BeforeValidator(without_user)]
OptionalPlace = Annotated[str | None, AfterValidator(sound_place), BeforeValidator(without_user)]
