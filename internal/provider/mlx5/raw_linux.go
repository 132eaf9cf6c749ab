//go:build amd64 || arm64

package mlx5

import (
	"errors"
	"fmt"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Queue pairs of Ethernet frames. To the device they are two queues that have little to do with each other: one of sends, whose number is
// the queue pair's, and one of receives, which flow rules bring frames to. The kernel wants their memory apart.

var (
	errFrameInline = fmt.Errorf("%w: this device wants the first %d bytes of a frame inline (ib.DeviceAttr.MinFrameInline)", driver.ErrInvalidWR, frameInline)
	errFrameShort  = fmt.Errorf("%w: a frame has an Ethernet header, of %d bytes", driver.ErrInvalidWR, shortestSend)
	errFrameLong   = fmt.Errorf("%w: inline data longer than MaxInline", driver.ErrInvalidWR)
	errNoChecksum  = fmt.Errorf("%w: this device has no checksums of frames (ib.CapFrameChecksum)", driver.ErrInvalidWR)
)

// Bits of an Ethernet segment.
const (
	ethIPChecksum   = 1 << 6
	ethPortChecksum = 1 << 7 // TCP's or UDP's
)

// Bits of a completion's cqeHeaders.
const (
	headersIPRight   = 1 << 1
	headersPortRight = 1 << 2
	headersIPv4      = 2 << 2 << 8
	headersIPMask    = 3 << 2 << 8
)

// openRaw finds out whether the device has such queue pairs.
func (q *qp) openRaw(cfg *driver.QPConfig) error {
	a, err := q.c.QueryDevice()
	switch {
	case err != nil:
		return err
	case !a.Caps.Has(ib.CapRawPacket):
		return fmt.Errorf("%w: raw packet queue pairs, without an Ethernet port or on a kernel whose completions have no user index", errors.ErrUnsupported)
	case cfg.SRQ != nil:
		return errors.New("a raw packet queue pair has a receive queue of its own")
	case a.Caps.Has(ib.CapFrameChecksum):
		q.csum = ib.SendChecksum
	}
	return nil
}

// writeFrame is write for a frame.
func (q *qp) writeFrame(wr *ib.SendWR) (n uint32, err error) {
	head, rest := wr.Inline, []byte(nil)
	size := uint64(len(head))
	switch {
	case len(wr.SGEs) > q.maxSGE:
		return 0, driver.ErrTooManySGEs
	case len(head) > q.inline:
		return 0, errFrameLong
	case len(head) < q.c.info.minInline:
		return 0, errFrameInline
	case wr.Flags&ib.SendChecksum&^q.csum != 0:
		return 0, errNoChecksum
	case len(wr.SGEs) == 0:
		head, rest = head[:q.c.info.minInline], head[q.c.info.minInline:]
	}
	for i := range wr.SGEs {
		s := &wr.SGEs[i]
		if s.Length > maxSGELen {
			return 0, errSGELen
		}
		size += uint64(s.Length)
	}
	if size < shortestSend {
		return 0, errFrameShort
	}
	checksums := uint8(0)
	if wr.Flags&ib.SendChecksum != 0 {
		checksums = ethIPChecksum | ethPortChecksum
	}
	sq := &q.sq
	p := sq.block(sq.cur)
	seg := forward(p, ctrlBytes)
	eth := sq.putEth(seg, checksums, head)
	n = ctrlBytes/unitBytes + eth
	seg = sq.around(seg, eth)
	if len(rest) > 0 {
		n += sq.putInline(seg, rest)
	}
	for i := range wr.SGEs {
		s := &wr.SGEs[i]
		if s.Length == 0 {
			continue
		}
		putSGE(seg, s)
		seg = sq.around(seg, dataBytes/unitBytes)
		n += dataBytes / unitBytes
	}
	sq.putControl(p, codeSend, q.number, n, ctrlFlags[wr.Flags&7]|q.sigFlags, 0)
	return n, nil
}

// admit tells the device of the receives that are posted. Its queue of these works from Init on, where a queue pair must not receive yet: so
// till then they are counted where it does not look.
func (q *qp) admit() {
	q.recvMu.Lock()
	defer q.recvMu.Unlock()
	if q.rq.limit > 0 {
		q.rq.record = q.rec.word[recvWord]
		publish(q.rq.record, be32(q.rq.head&0xffff))
	}
}

// checksums are the flags of a completion for a frame.
func (q *qp) checksums(e cqe) ib.WCFlags {
	const right = headersIPRight | headersPortRight
	if h := cqeHeaders(e); q.csum != 0 && h&right == right && h&headersIPMask == headersIPv4 {
		return ib.WCChecksumOK
	}
	return 0
}

// A flow is a flow rule.
type flow struct {
	c      *uverbs.Context
	handle uint32
}

// Steer implements driver.Steerer.
func (q *qp) Steer(r *ib.FlowRule) (driver.Flow, error) {
	if err := q.c.Removed(); err != nil {
		return nil, err
	}
	h, err := q.c.CreateFlow(q.Handle, r)
	if err != nil {
		return nil, err
	}
	return &flow{q.c.Context, h}, nil
}

// Close implements driver.Flow.
func (f *flow) Close() error { return uverbs.Destroyed(f.c.DestroyFlow(f.handle)) }
