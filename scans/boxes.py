"""Boxes as pictures: detection's answer is the image with a white outline around every finding.

Paper, section 4.2, "Other tasks" (DeepLesion).

- A box is (top, left, bottom, right), from its first row and column to its last.
- `draw` and `read` go from boxes to such a picture and back. `drawn` tells such a picture from any
  other, so that a prompt says by itself that it asks for boxes.
- `fill` and `around` go from boxes to a mask of their insides and back (ours): a small model paints
  a mask well, as it paints any class, but its pixels are larger than an outline is wide.
"""

import numpy as np
import torch
import torch.nn.functional as F

FAINTEST = 0.02     # fit of the faintest rectangle that is taken for a box
FAINTER = 0.6       # and, of later rectangles, their fit as a share of the first one's
LEAST_KNOWN = 0.4   # share of its cells that the mean of an edge, or of an inside, is taken over


# --------------------------------------------------------------------------------------------------
# From boxes to pictures

def draw(image: np.ndarray, boxes: list, width: int = 2) -> np.ndarray:
    """An image (H, W) in [0, 1] with white boxes drawn on it, float32.

    width: of the lines, in pixels; they lie inside of the boxes.
    """
    image = np.array(image, np.float32)
    for top, left, bottom, right in boxes:
        inner_rows = slice(top + width, bottom + 1 - width)
        inner_columns = slice(left + width, right + 1 - width)
        inside = image[inner_rows, inner_columns].copy()
        image[top:bottom + 1, left:right + 1] = 1
        if inside.size:
            image[inner_rows, inner_columns] = inside
    return image


def fill(boxes: list, shape: tuple) -> np.ndarray:
    """The mask of boxes, lines included: (H, W) uint8, 0 and 1. shape: (H, W)"""
    mask = np.zeros(shape, np.uint8)
    for top, left, bottom, right in boxes:
        mask[top:bottom + 1, left:right + 1] = 1
    return mask


# --------------------------------------------------------------------------------------------------
# From a mask to boxes

def around(mask: np.ndarray, least: float = 0.1, side: int = 256) -> list:
    """Boxes around the connected parts of a mask (H, W), the part of most pixels first.

    least: parts with a smaller share of the largest part's pixels are left out.
    side: parts are told apart on a grid of at most side x side cells, so that a large mask takes no
    longer; parts nearer to each other than a cell may count as one.
    """
    mask = torch.from_numpy(np.ascontiguousarray(mask > 0))
    grid = [min(n, side) for n in mask.shape]
    coarse = F.adaptive_max_pool2d(mask[None, None].float(), grid)  # (H, W) -> (1, 1, h, w)
    numbers = _number_parts(coarse)[0, 0]  # (h, w)
    row_cells, column_cells = (torch.arange(n) * cells // n for n, cells in zip(mask.shape, grid))
    parts = numbers[row_cells[:, None], column_cells] * mask  # (h, w) -> (H, W)
    part_numbers, sizes = parts[mask].unique(return_counts=True)
    found = []
    for i in sizes.argsort(descending=True):
        if sizes[i] >= least * sizes.max():
            rows, columns = torch.where(parts == part_numbers[i])
            box = (rows.min(), columns.min(), rows.max(), columns.max())
            found.append(tuple(int(v) for v in box))
    return found


def _number_parts(mask):
    """(1, 1, h, w) of 0 and 1 -> the same shape, one number above 0 for every connected part.

    Every cell starts with a number of its own and takes the largest of its eight neighbours' as
    long as that changes anything.
    """
    parts = torch.arange(1, mask.numel() + 1).view_as(mask) * mask
    while True:
        spread = F.max_pool2d(parts, kernel_size=3, stride=1, padding=1) * mask
        if torch.equal(spread, parts):
            return parts
        parts = spread


# --------------------------------------------------------------------------------------------------
# From a picture to boxes

def drawn(answer: np.ndarray, image: np.ndarray) -> list:
    """The boxes of an answer that is the image with white boxes drawn on it, else [].

    answer, image: (H, W) in [0, 1]. Of the image nothing may have become darker and less than 0.3
    brighter; 0.8 of what became brighter has to lie along the boxes that are read, and 0.9 of their
    edges have to be white.
    """
    brighter = answer - image > 0.1
    darker = image - answer > 0.1
    if not 0 < brighter.mean() < 0.3 or darker.mean() > 0.005:
        return []
    found = read(answer, image)
    if not found:
        return []
    black = np.zeros_like(image)
    wider = [(max(0, top - 1), max(0, left - 1), bottom + 1, right + 1)
             for top, left, bottom, right in found]
    near = draw(black, wider, width=max(6, len(image) // 64)) > 0
    edges = draw(black, found, width=1) > 0
    explained = brighter[near].sum() > 0.8 * brighter.sum()
    white = (answer[edges] > 0.8).mean() > 0.9
    return found if explained and white else []


def read(painted: np.ndarray, image: np.ndarray, side: int = 64, most: int = 8) -> list:
    """The white boxes drawn onto an image, the plainest first; at most `most`.

    painted, image: (H, W) in [0, 1]. side: rectangles are searched for on a grid of at most
    side x side cells, and then moved to the pixel.

    A pixel's line is how far it went from the image to white, 0 to 1. Nothing is known of pixels
    that are white in the image. The best rectangle of the grid is taken, what lies along its edges
    is unknown from then on, and so on until the next rectangle's fit is below 0.6 of the first's.
    """
    height, width = image.shape
    lines = np.clip((np.asarray(painted, np.float32) - image) / (1.1 - image), 0, 1)
    known = np.clip((1 - image) / 0.15, 0, 1).astype(np.float32)
    grid = (min(height, side), min(width, side))
    coarse_lines = _largest_in_cells(lines, grid)  # (H, W) -> (h, w)
    coarse_known = _largest_in_cells(known, grid)  # (H, W) -> (h, w)
    cell = (height / grid[0], width / grid[1])
    found, least = [], FAINTEST
    for _ in range(most):
        fit, box = _best_rectangle(coarse_lines, coarse_known)
        if box is None or fit < least:
            break
        if not found:
            least = max(FAINTEST, FAINTER * fit)
        found.append(sharpen(lines, box, cell))
        _forget_edges(coarse_known, box)
    return found


def _largest_in_cells(picture, grid):
    """(H, W) -> (h, w), the largest value of every cell, so that a thin line keeps its strength."""
    return F.adaptive_max_pool2d(torch.from_numpy(picture)[None, None], grid)[0, 0].numpy()


class _Sums:
    """Sums of a grid (h, w) over rows, columns and rectangles of cells, each from 2 to 4 look-ups.

    All numbers of cells may be arrays, which broadcast.
    """

    def __init__(self, grid):
        self.along = np.pad(grid.cumsum(1), ((0, 0), (1, 0)))         # of a row, before a column
        self.down = np.pad(grid.cumsum(0), ((1, 0), (0, 0)))          # of a column, before a row
        self.whole = np.pad(grid.cumsum(1).cumsum(0), ((1, 0), (1, 0)))

    def row(self, y, left, right):
        """From the cell (y, left) to the cell (y, right)."""
        return self.along[y, right + 1] - self.along[y, left]

    def column(self, x, top, bottom):
        """From the cell (top, x) to the cell (bottom, x)."""
        return self.down[bottom + 1, x] - self.down[top, x]

    def inside(self, top, left, bottom, right):
        """Of the rectangle without its edges."""
        return (self.whole[bottom, right] - self.whole[bottom, left + 1]
                - self.whole[top + 1, right] + self.whole[top + 1, left + 1])


def _best_rectangle(lines, known):
    """The rectangle with the best fit on a grid: (fit, box in cells), (0.0, None) if none is above.

    lines: (h, w), how much of a line a cell has; known: (h, w), 0 where nothing is known of it.
    All rectangles of at least 3 x 3 cells are tried: for every top row, all bottom rows (b, 1)
    with all pairs of a left and a right column (p,).
    """
    h, w = lines.shape
    line_sums, known_sums = _Sums(lines * known), _Sums(known)
    left, right = np.triu_indices(w - 2)  # (p,): all pairs with left <= right,
    right = right + 2                     # now left + 2 <= right
    best, box = 0.0, None
    for top in range(h - 2):
        bottom = np.arange(top + 2, h)[:, None]  # (b, 1)
        fit = _fit(line_sums, known_sums, (top, left, bottom, right))  # (b, p)
        i = int(fit.argmax())
        if fit.flat[i] > best:
            best = fit.flat[i]
            b, p = np.unravel_index(i, fit.shape)
            box = (top, int(left[p]), int(bottom[b, 0]), int(right[p]))
    return best, box


def _fit(lines, known, box):
    """How well rectangles fit: their edges' mean line less that of their inside; may be below 0.

    The edges' is the mean of the faintest edge and of all four, so that no edge may be missing.
    lines, known: `_Sums`. box: numbers of cells, or arrays of such, which broadcast.
    """
    top, left, bottom, right = box
    height, width = bottom - top + 1, right - left + 1

    def mean(line, line_known, cells):
        """Over what is known, but at least over `LEAST_KNOWN` of the cells."""
        return line / np.maximum(line_known, LEAST_KNOWN * cells)

    rows = [mean(lines.row(y, left, right), known.row(y, left, right), width)
            for y in (top, bottom)]
    columns = [mean(lines.column(x, top, bottom), known.column(x, top, bottom), height)
               for x in (left, right)]
    inside = mean(lines.inside(top, left, bottom, right), known.inside(top, left, bottom, right),
                  (height - 2) * (width - 2))
    faintest = np.minimum(np.minimum(rows[0], rows[1]), np.minimum(columns[0], columns[1]))
    average = ((rows[0] + rows[1]) + (columns[0] + columns[1])) / 4
    return (faintest + average) / 2 - inside


def _forget_edges(known, box):
    """Set `known` (h, w) to 0, in place, along the edges of a box and one cell to either side."""
    top, left, bottom, right = box
    for y in (top, bottom):
        known[max(0, y - 1):y + 2, max(0, left - 1):right + 2] = 0
    for x in (left, right):
        known[max(0, top - 1):bottom + 2, max(0, x - 1):x + 2] = 0


def sharpen(lines: np.ndarray, box: tuple, cell: tuple) -> tuple:
    """Move the edges of a box from the cells of a grid to the pixel.

    lines: (H, W); box: in cells; cell: (rows, columns) of pixels that a cell has, which may be no
    integers. Returns the box in pixels.
    """
    tops = _pixels(box[0], cell[0])
    lefts = _pixels(box[1], cell[1])
    bottoms = _pixels(box[2], cell[0])
    rights = _pixels(box[3], cell[1])
    rows = lines[:, lefts[0]:rights[1]].mean(1)   # (H,)
    columns = lines[tops[0]:bottoms[1]].mean(0)   # (W,)
    return (_outer_edge(rows, tops, -1), _outer_edge(columns, lefts, -1),
            _outer_edge(rows, bottoms, 1), _outer_edge(columns, rights, 1))


def _pixels(number, size):
    """The pixels of a cell: (first, after the last), at least one."""
    first = int(number * size)
    return first, max(int(np.ceil((number + 1) * size)), first + 1)


def _outer_edge(profile, span, outwards):
    """The outermost pixel of the line that is brightest in a span of pixels.

    profile: (n,), the mean line of all rows or of all columns. outwards: 1 or -1. From the
    brightest pixel the line goes on as long as it hardly rises and is at least half as bright.
    """
    first, after = span
    brightest = first + int(profile[first:after].argmax())
    edge = brightest
    while 0 <= edge + outwards < len(profile):
        following = profile[edge + outwards]
        if not profile[brightest] / 2 <= following <= 1.02 * profile[edge]:
            break
        edge += outwards
    return edge
