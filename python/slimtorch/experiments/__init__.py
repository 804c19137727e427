# SPDX-License-Identifier: Apache-2.0
"""The experiments behind the claims: each trains or loads real networks, measures them, and reports what it found."""
