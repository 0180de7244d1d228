"""What a run tells of itself."""

from sidp.batch.metrics import Snapshot, Timeline


def test_a_timeline_stays_short_and_keeps_even_distances():
    timeline = Timeline()
    begin = timeline._begin
    for moment in range(5000):
        ranks = [dict.fromkeys(Timeline.COLUMNS, float(moment)) for _ in range(2)]
        timeline.add(Snapshot(begin + moment, 9, moment % 9, ranks))
    columns, rows = timeline.table().values()
    assert len(columns) == len(rows[0]) and 200 < len(rows) <= Timeline.MOST
    seconds = [row[0] for row in rows]
    step = seconds[1] - seconds[0]
    assert seconds == [step * i for i in range(len(rows))] and 5000 - seconds[-1] <= step
    assert all(row[columns.index("output_tokens")] == 2 * row[0] for row in rows)
