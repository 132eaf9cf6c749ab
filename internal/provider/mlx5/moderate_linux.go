//go:build amd64 || arm64

package mlx5

import "time"

// Moderate implements driver.CQModerator.
func (q *cq) Moderate(count int, period time.Duration) error {
	q.changeMu.Lock() // or the handle could be another queue's
	defer q.changeMu.Unlock()
	if err := q.Err(); err != nil {
		return err
	}
	us := (period + time.Microsecond - 1) / time.Microsecond
	return q.c.ModerateCQ(q.handle, uint16(count), uint16(us))
}
