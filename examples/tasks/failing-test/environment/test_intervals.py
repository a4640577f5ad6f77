import unittest

from intervals import merge, size


class Intervals(unittest.TestCase):
    def test_merge(self):
        self.assertEqual(merge([(1, 4), (3, 6)]), [(1, 6)])
        self.assertEqual(merge([(8, 9), (1, 2)]), [(1, 2), (8, 9)])
        self.assertEqual(merge([(1, 9), (2, 3)]), [(1, 9)])
        self.assertEqual(merge([(1, 2), (3, 4)]), [(1, 4)])

    def test_size(self):
        self.assertEqual(size([(1, 4), (3, 6), (9, 9)]), 7)


if __name__ == "__main__":
    unittest.main()
