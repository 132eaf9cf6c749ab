package siw

import (
	"sync/atomic"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A ledger is the account of a send or receive queue: what was posted, and what became of it, until that was polled. The kernel
// is given positions in it as the requests' IDs, so that a completion says exactly which request it is of, and one that comes
// twice, or too late, is known for what it is.
//
// Posting writes entries, and then posted; polling, with the completion queue's lock held, reads entries below posted, writes
// what became of them, and then retired. An entry is written again only when retired has passed it.
type ledger struct {
	q       *qp
	recv    bool
	entries []entry // a power of two
	posted  atomic.Uint64
	retired atomic.Uint64

	// Guarded by the completion queue's lock.
	taken    uint64  // requests below it were taken by the kernel: something after them has completed
	listed   bool    // in the completion queue's list of ledgers that have something to hand out
	flushing bool    // in its list of those to flush
	next     *ledger // in the former
}

// An entry is a work request.
type entry struct {
	id     uint64 // the caller's
	bytes  uint32
	head   uint32 // the word with the flags, for the time between writing the slot and giving it away
	vendor uint16
	op     ib.WCOpcode
	status ib.WCStatus
	is     facts
	gate   gate // what decides when the kernel is given it; only posting writes it
}

type facts uint8

const (
	signaled facts = 1 << iota // the caller wants to hear of its success
	silent                     // the kernel does not tell of its success: something later does
	late                       // posted when the queue pair had failed: the kernel has not seen it
	done                       // bytes and status are known
)

type gate uint8

const (
	_      gate = iota // at once
	reads              // it is an RDMA READ, also for the kernel
	fenced             // it waits for the READs before it
)

func (l *ledger) init(q *qp, recv bool, depth int) {
	l.q, l.recv = q, recv
	l.entries = make([]entry, depth)
}

func (l *ledger) at(pos uint64) *entry { return &l.entries[pos&uint64(len(l.entries)-1)] }

// room is how many requests can be posted, as polling has left it.
func (l *ledger) room() int { return len(l.entries) - int(l.posted.Load()-l.retired.Load()) }

// complete notes what the kernel says of a request. It reports false if there is no such request outstanding.
func (l *ledger) complete(pos uint64, bytes uint32, status uint16) bool {
	end := l.posted.Load()
	if !l.recv {
		end = l.q.given.Load()
	}
	if pos < l.retired.Load() || pos >= end {
		return false
	}
	e := l.at(pos)
	if e.is&done != 0 {
		return false
	}
	e.bytes, e.vendor, e.status = bytes, status, wcStatus(status)
	e.is |= done
	if e.gate == reads {
		l.q.readsDone.Add(1)
	}
	l.taken = max(l.taken, pos+1)
	return true
}

// handOut writes completions that are due, in the order of posting, and returns how many. more says that wcs had no room for
// the next.
func (l *ledger) handOut(wcs []ib.WC) (n int, more bool) {
	pos, end := l.retired.Load(), l.posted.Load()
	for ; pos < end; pos++ {
		e := l.at(pos)
		if e.is&done == 0 {
			if e.is&silent != 0 && pos < l.taken {
				continue
			}
			break
		}
		if e.is&signaled == 0 && e.status == ib.WCSuccess {
			continue
		}
		if n == len(wcs) {
			more = true
			break
		}
		wcs[n] = ib.WC{ID: e.id, Status: e.status, Opcode: e.op, QPN: l.q.QPN(), VendorErr: uint32(e.vendor)}
		if e.op == ib.WCRecv || e.op == ib.WCRDMARead {
			wcs[n].ByteLen = e.bytes
		}
		n++
	}
	l.retired.Store(pos)
	return n, more
}

// flush notes that the kernel, which has said everything about the queue, will complete nothing that is left. What it had been given
// and has taken, and was not asked to tell of, has succeeded: it tells of every failure.
func (l *ledger) flush() {
	for pos := l.retired.Load(); pos < l.posted.Load(); pos++ {
		e := l.at(pos)
		if e.is&done != 0 {
			continue
		}
		if e.is&(signaled|silent|late) == 0 {
			l.q.scq.hidden.Add(-1)
		}
		e.is |= done
		if e.status = ib.WCFlushErr; e.is&(silent|late) == silent && pos < l.q.given.Load() && wqeFree(l.q.sq.head(pos)) {
			e.status = ib.WCSuccess
		}
	}
}

// unfinished reports whether something was posted and not handed out.
func (l *ledger) unfinished() bool { return l.retired.Load() != l.posted.Load() }

// statuses are the driver's as the specification has them.
var statuses = [abi.SIW_NUM_WC_STATUS]ib.WCStatus{
	abi.SIW_WC_SUCCESS:         ib.WCSuccess,
	abi.SIW_WC_LOC_LEN_ERR:     ib.WCLocalLengthErr,
	abi.SIW_WC_LOC_PROT_ERR:    ib.WCLocalProtErr,
	abi.SIW_WC_LOC_QP_OP_ERR:   ib.WCLocalQPOpErr,
	abi.SIW_WC_WR_FLUSH_ERR:    ib.WCFlushErr,
	abi.SIW_WC_BAD_RESP_ERR:    ib.WCBadRespErr,
	abi.SIW_WC_LOC_ACCESS_ERR:  ib.WCLocalAccessErr,
	abi.SIW_WC_REM_ACCESS_ERR:  ib.WCRemoteAccessErr,
	abi.SIW_WC_REM_INV_REQ_ERR: ib.WCRemoteInvalidReqErr,
	abi.SIW_WC_GENERAL_ERR:     ib.WCGeneralErr,
}

func wcStatus(s uint16) ib.WCStatus {
	if int(s) < len(statuses) {
		return statuses[s]
	}
	return ib.WCGeneralErr
}
