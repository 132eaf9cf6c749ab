package driver

import (
	"errors"
	"fmt"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// What a work request itself can have wrong; all match ErrInvalidWR. They are made once, because the data path must not
// allocate.
var (
	ErrNoInline    = fmt.Errorf("%w: inline payload with SGEs, longer than MaxInline, or with an opcode that has none", ErrInvalidWR)
	ErrOpcode      = fmt.Errorf("%w: this QP type has no such operation", ErrInvalidWR)
	ErrTooManySGEs = fmt.Errorf("%w: more SGEs than the queue was made for", ErrInvalidWR)
	ErrAtomicLen   = fmt.Errorf("%w: an atomic needs one 8-byte buffer for the old value", ErrInvalidWR)
	ErrNoBind      = fmt.Errorf("%w: a bind request needs its Bind field", ErrInvalidWR)
	ErrNoAH        = fmt.Errorf("%w: a datagram needs an address handle of this context", ErrInvalidWR)
	ErrFlush       = fmt.Errorf("%w: a flush needs a placement, a known level, and no buffers", ErrInvalidWR)
	ErrAtomicWrite = fmt.Errorf("%w: an atomic write has 8 bytes, inline or in one SGE", ErrInvalidWR)
	ErrNoPlacement = fmt.Errorf("%w: FLUSH and ATOMIC_WRITE: %w by this device", ErrInvalidWR, errors.ErrUnsupported)
	ErrHasSRQ      = fmt.Errorf("%w: the QP has a shared receive queue: post to that", ErrInvalidWR)
)

// Sets of opcodes, a bit each.
const (
	OpsRC = 1<<ib.OpRDMAWrite | 1<<ib.OpRDMAWriteWithImm | 1<<ib.OpSend | 1<<ib.OpSendWithImm | 1<<ib.OpRDMARead |
		1<<ib.OpAtomicCmpSwap | 1<<ib.OpAtomicFetchAdd | 1<<ib.OpLocalInv | 1<<ib.OpBindMW | 1<<ib.OpSendWithInv
	OpsUC = 1<<ib.OpRDMAWrite | 1<<ib.OpRDMAWriteWithImm | 1<<ib.OpSend | 1<<ib.OpSendWithImm | 1<<ib.OpLocalInv |
		1<<ib.OpBindMW
	OpsUD     = 1<<ib.OpSend | 1<<ib.OpSendWithImm
	OpsInline = 1<<ib.OpRDMAWrite | 1<<ib.OpRDMAWriteWithImm | 1<<ib.OpSend | 1<<ib.OpSendWithImm | 1<<ib.OpSendWithInv
	OpsPlain  = OpsInline | 1<<ib.OpRDMARead
	OpsAtomic = 1<<ib.OpAtomicCmpSwap | 1<<ib.OpAtomicFetchAdd
)

// CheckSendWR finds what can be wrong with a send work request by itself, on a QP of that type and size. It knows no FLUSH and
// no ATOMIC_WRITE, which are ErrOpcode: devices that have them give these to CheckPlacementWR instead.
func CheckSendWR(t ib.QPType, c *ib.QPCap, wr *ib.SendWR) error {
	ops := uint32(OpsRC)
	if t != ib.RC {
		ops = OpsUC
		if t == ib.UD {
			ops = OpsUD
		}
	}
	bit := uint32(1) << (wr.Opcode & 31)
	if ops&bit == 0 || wr.Opcode > ib.OpSendWithInv {
		return ErrOpcode
	}
	if len(wr.SGEs) > c.MaxSendSGE {
		return ErrTooManySGEs
	}
	if len(wr.Inline) > 0 && (len(wr.SGEs) > 0 || len(wr.Inline) > c.MaxInline || OpsInline&bit == 0) {
		return ErrNoInline
	}
	if bit&(OpsAtomic|1<<ib.OpBindMW) != 0 {
		if bit&OpsAtomic != 0 && (len(wr.SGEs) != 1 || wr.SGEs[0].Length != 8) {
			return ErrAtomicLen
		}
		if wr.Opcode == ib.OpBindMW && wr.Bind == nil {
			return ErrNoBind
		}
	}
	return nil
}

// CheckPlacementWR is CheckSendWR for requests whose opcode is OpFlush or above.
func CheckPlacementWR(t ib.QPType, c *ib.QPCap, wr *ib.SendWR) error {
	switch {
	case t != ib.RC:
		return ErrOpcode
	case wr.Opcode == ib.OpFlush:
		f := wr.Flush
		if f.Placement == 0 || f.Placement > ib.FlushGlobal|ib.FlushPersistent || f.Level > ib.FlushRegion || len(wr.SGEs)+len(wr.Inline) > 0 {
			return ErrFlush
		}
	case wr.Opcode == ib.OpAtomicWrite:
		inline := len(wr.Inline) == 8 && c.MaxInline >= 8 && len(wr.SGEs) == 0
		gather := len(wr.SGEs) == 1 && wr.SGEs[0].Length == 8 && len(wr.Inline) == 0
		if !inline && !gather {
			return ErrAtomicWrite
		}
	default:
		return ErrOpcode
	}
	return nil
}

var stateErrs = func() (e [ib.Err + 1]error) {
	for s := range e {
		e[s] = fmt.Errorf("%w: it is %v", ErrState, ib.QPState(s))
	}
	return e
}()

// StateErr is the ErrState of a QP in state s.
func StateErr(s ib.QPState) error {
	if s > ib.Err {
		return ErrState
	}
	return stateErrs[s]
}
