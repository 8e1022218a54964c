import random

from dsv3.inference.blocks import BlockPool, key_after, root_key


def keys_of(tokens, size, salt=""):
    keys, key = [], root_key(salt)
    for k in range(len(tokens) // size):
        key = key_after(key, tokens[k * size : (k + 1) * size])
        keys.append(key)
    return keys


def filled(pool, tokens, salt=""):
    """Blocks that hold these tokens, known by them."""
    keys = keys_of(tokens, pool.block_size, salt)
    blocks = [pool.take() for _ in keys]
    for k, (number, key) in enumerate(zip(blocks, keys, strict=True)):
        pool.remember(number, key, tokens[k * pool.block_size : (k + 1) * pool.block_size])
    return blocks


def test_a_prefix_is_found_until_its_blocks_are_taken():
    pool, tokens = BlockPool(4, 2), [1, 2, 3, 4, 5, 6]
    blocks = filled(pool, tokens)
    assert pool.find(keys_of(tokens, 2)[:2], tokens) == blocks[:2]
    assert pool.find(keys_of([1, 2, 9, 9], 2), [1, 2, 9, 9]) == blocks[:1]
    assert pool.find(keys_of(tokens, 2, "tenant"), tokens) == []
    for held in (blocks[:2], blocks[:1], blocks):
        pool.release(held)
    assert pool.usage == 0
    # Unused first, then what was released first; of one sequence, the end before the beginning.
    assert [pool.take() for _ in range(2)] == [3, blocks[2]]
    assert pool.find(keys_of(tokens, 2), tokens) == blocks[:2]
    assert pool.usage == 1


def test_a_key_alone_finds_nothing():
    """Whoever made two prefixes with one key would still not read the other's."""
    pool = BlockPool(2, 2)
    filled(pool, [1, 2])
    assert pool.find(keys_of([1, 2], 2), [1, 3]) == []


def test_the_first_of_two_equal_blocks_stays_the_known_one():
    pool = BlockPool(4, 2)
    first, second = filled(pool, [1, 2]), filled(pool, [1, 2])
    pool.release(second)
    assert pool.find(keys_of([1, 2], 2), [1, 2]) == first
    pool.forget(first[0])
    assert pool.find(keys_of([1, 2], 2), [1, 2]) == []


def test_any_history_keeps_count():
    pool, generator, held = BlockPool(12, 2), random.Random(0), []
    for _ in range(3000):
        if held and (generator.random() < 0.5 or len(pool.free) < 3):
            pool.release(held.pop(generator.randrange(len(held))))
        else:
            tokens = [generator.randrange(2) for _ in range(6)]
            found = pool.find(keys_of(tokens, 2), tokens)
            more = [pool.take() for _ in range(min(3 - len(found), len(pool.free)))]
            for k, number in enumerate(more, len(found)):
                pool.remember(number, keys_of(tokens, 2)[k], tokens[2 * k : 2 * k + 2])
            held.append(found + more)
        users = [number for blocks in held for number in blocks]
        assert [block.users for block in pool.blocks] == [users.count(number) for number in range(12)]
        assert set(pool.free) == set(range(12)) - set(users)
        assert all(pool.blocks[number].key == key for key, number in pool.known.items())
    for blocks in held:
        pool.release(blocks)
    assert pool.usage == 0
