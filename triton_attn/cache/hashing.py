"""Names of full pages: a hash of a page's tokens and of everything before them.

    hash of page i = SHA-256(hash of page i - 1, token ids of page i as int64),  hash of page -1 = SHA-256(salt)

Users choose token ids, and who can make two prefixes collide can read another user's cache through the page that both
name: hence a cryptographic hash, not Python's `hash`.
"""

import hashlib

NO_SALT = hashlib.sha256(b"").digest()


def root_hash(salt):
    """What the chain of a sequence begins with: sequences find each other's pages only under one salt.

    Args:
        salt: str, bytes, or None; "a", b"a" and None are all different.
    """
    if salt is None:
        return NO_SALT
    if isinstance(salt, str):
        return hashlib.sha256(b"s" + salt.encode()).digest()
    if isinstance(salt, bytes):
        return hashlib.sha256(b"b" + salt).digest()
    raise TypeError(f"salt: expected str, bytes or None, got {type(salt).__name__}")


def page_hashes(chain, token_ids, page_size):
    """Hashes of full pages, one after the other, computed only as far as they are asked for.

    Args:
        chain: list of the root and the hashes of all pages before them; each hash is added before it is given out.
        token_ids: int64 array; a rest that fills no page is left out.
    """
    token_bytes, parent = token_ids.tobytes(), chain[-1]
    page_bytes = 8 * page_size
    for end in range(page_bytes, len(token_bytes) + 1, page_bytes):
        parent = hashlib.sha256(parent + token_bytes[end - page_bytes : end]).digest()
        chain.append(parent)
        yield parent
