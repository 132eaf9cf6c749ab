package mr

import (
	"errors"
	"fmt"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Sub registers n bytes at off of m once more, as a region of their own with rights and keys of its own: who has its key
// reaches these bytes and no others, until it is closed. Unlike binding a Window it is a system call on most devices, and
// works on all. m cannot be closed before it. access is independent of m's; remote writes and atomics need ib.AccessLocalWrite.
// It panics, as a slice expression does, if the bytes are not within m.
func (m *MR) Sub(off, n int, access ib.Access) (*MR, error) {
	if off < 0 || n < 0 || off > m.n-n {
		panic(rangeError{off, n, m.n})
	}
	dev := m.pd.Context().Name()
	if err := access.Check(); err != nil {
		return nil, opErr("reg_mr", dev, err)
	}
	switch {
	case n == 0:
		return nil, opErr("reg_mr", dev, errors.New("no bytes cannot be registered"))
	case m.buf == nil:
		return nil, opErr("reg_mr", dev, fmt.Errorf("a part of a dma-buf's region: register that part of the dma-buf: %w", errors.ErrUnsupported))
	}
	s := &MR{pd: m.pd, buf: m.buf[off : off+n : off+n], n: n, access: access, parent: m}
	if err := s.registerBytes(-1); err != nil {
		return nil, err
	}
	return s, nil
}
