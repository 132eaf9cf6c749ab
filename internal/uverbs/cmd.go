package uverbs

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/ringside-rdma/ringside/internal/abi"
)

// An Attr is one attribute of an ioctl method. Make them with the functions below; b and the pointers must stay untouched
// until the call returns.
type Attr struct {
	id    uint16
	kind  attrKind
	value uint64
	b     []byte
	h     *uint32
	fd    *int
}

type attrKind uint8

const (
	attrIn attrKind = iota
	attrOut
	attrConst
	attrHandle
	attrNewHandle
	attrNewFD
)

// In is data for the kernel.
func In(id uint16, b []byte) Attr { return Attr{id: id, kind: attrIn, b: b} }

// Out is where the kernel puts data: all of b is written over.
func Out(id uint16, b []byte) Attr { return Attr{id: id, kind: attrOut, b: b} }

// Const is a number: a port, a type, flags.
func Const(id uint16, v uint64) Attr { return Attr{id: id, kind: attrConst, value: v} }

// Handle names an object.
func Handle(id uint16, h uint32) Attr { return Attr{id: id, kind: attrHandle, value: uint64(h)} }

// NewHandle is where the handle of the object that the method makes is put.
func NewHandle(id uint16, h *uint32) Attr { return Attr{id: id, kind: attrNewHandle, h: h} }

// NewFD is where the descriptor that the method opens is put.
func NewFD(id uint16, fd *int) Attr { return Attr{id: id, kind: attrNewFD, fd: fd} }

const (
	hdrLen  = 24 // struct ib_uverbs_ioctl_hdr
	attrLen = 16 // struct ib_uverbs_attr
)

// ErrTooLarge is a command that does not fit into the buffer for commands.
var ErrTooLarge = errors.New("uverbs: the command is larger than the buffer for commands")

// A buffer is memory in which a command is built and answered. It is outside of the Go heap, because the kernel gets the
// addresses of its parts as numbers, which the garbage collector does not see.
type buffer struct {
	mem  []byte // page aligned
	addr uint64 // of mem
}

// marshal builds the command in b, and returns its length. In-attributes of up to 8 bytes lie in the attribute itself,
// everything else, and every out-attribute of any length, beside it at 8-byte alignment.
func (b buffer) marshal(driver uint32, object, method uint16, attrs []Attr) (int, error) {
	n := hdrLen + attrLen*len(attrs)
	if n > len(b.mem) {
		return 0, ErrTooLarge
	}
	h := b.mem[:n]
	clear(h)
	le := binary.NativeEndian
	le.PutUint16(h[0:], uint16(n))
	le.PutUint16(h[2:], object)
	le.PutUint16(h[4:], method)
	le.PutUint16(h[6:], uint16(len(attrs)))
	le.PutUint32(h[16:], driver)
	at := n
	for i := range attrs {
		a := &attrs[i]
		p := h[hdrLen+attrLen*i:][:attrLen]
		le.PutUint16(p[0:], a.id)
		le.PutUint16(p[4:], abi.UVERBS_ATTR_F_MANDATORY)
		switch a.kind {
		case attrIn, attrOut:
			if len(a.b) > 0xffff {
				return 0, ErrTooLarge
			}
			le.PutUint16(p[2:], uint16(len(a.b)))
			if a.kind == attrIn && len(a.b) <= 8 {
				copy(p[8:], a.b)
				continue
			}
			at = (at + 7) &^ 7
			if len(a.b) > len(b.mem)-at {
				return 0, ErrTooLarge
			}
			dst := b.mem[at:][:len(a.b)]
			if a.kind == attrIn {
				copy(dst, a.b)
			} else {
				clear(dst) // the kernel may fill it in part
			}
			le.PutUint64(p[8:], b.addr+uint64(at))
			at += len(a.b)
		case attrConst:
			le.PutUint16(p[2:], 8)
			le.PutUint64(p[8:], a.value)
		case attrHandle:
			le.PutUint64(p[8:], a.value)
		}
	}
	return n, nil
}

// unmarshal takes the results out of b after the call; attrs are marshal's.
func (b buffer) unmarshal(attrs []Attr) error {
	le := binary.NativeEndian
	for i := range attrs {
		a := &attrs[i]
		p := b.mem[hdrLen+attrLen*i:][:attrLen]
		v := le.Uint64(p[8:])
		switch a.kind {
		case attrOut:
			if len(a.b) == 0 {
				continue
			}
			at := v - b.addr
			if at > uint64(len(b.mem)) || uint64(len(a.b)) > uint64(len(b.mem))-at {
				return fmt.Errorf("uverbs: the kernel moved attribute %d", a.id)
			}
			copy(a.b, b.mem[at:])
		case attrNewHandle:
			*a.h = uint32(v)
		case attrNewFD:
			*a.fd = int(int64(v))
		}
	}
	return nil
}

// A WriteCmd is a command of the write() interface: the core request without its header, where the core response goes,
// and the provider's parts of both. Requests of the old form begin with the address of the response, which is filled in
// where it is needed.
type WriteCmd struct {
	Cmd           uint32 // IB_USER_VERBS_CMD_*, or IB_USER_VERBS_EX_CMD_* with the flag IB_USER_VERBS_CMD_FLAG_EXTENDED
	In, Out       []byte
	UHWIn, UHWOut []byte
}

func (w *WriteCmd) extended() bool { return w.Cmd&abi.IB_USER_VERBS_CMD_FLAG_EXTENDED != 0 }

// attrs is the command as INVOKE_WRITE carries it.
func (w *WriteCmd) attrs(to []Attr) []Attr {
	if len(w.In) > 0 {
		to = append(to, In(abi.UVERBS_ATTR_CORE_IN, w.In))
	}
	if len(w.Out) > 0 {
		to = append(to, Out(abi.UVERBS_ATTR_CORE_OUT, w.Out))
	}
	to = append(to, Const(abi.UVERBS_ATTR_WRITE_CMD, uint64(w.Cmd)))
	if len(w.UHWIn) > 0 {
		to = append(to, In(abi.UVERBS_ATTR_UHW_IN, w.UHWIn))
	}
	if len(w.UHWOut) > 0 {
		to = append(to, Out(abi.UVERBS_ATTR_UHW_OUT, w.UHWOut))
	}
	return to
}

// legacy builds the command as write() takes it. It returns its length, and where the response of outLen bytes, core then
// provider's, will be.
func (b buffer) legacy(w *WriteCmd) (n, out, outLen int, err error) {
	le := binary.NativeEndian
	head := 8
	if w.extended() {
		head = 24
	}
	n = head + len(w.In) + len(w.UHWIn)
	out = (n + 7) &^ 7
	outLen = len(w.Out) + len(w.UHWOut)
	if out+outLen > len(b.mem) || n > 4*0xffff {
		return 0, 0, 0, ErrTooLarge
	}
	clear(b.mem[:out+outLen])
	copy(b.mem[head:], w.In)
	copy(b.mem[head+len(w.In):], w.UHWIn)
	le.PutUint32(b.mem[0:], w.Cmd)
	response := b.addr + uint64(out)
	if outLen == 0 {
		response = 0
	}
	if w.extended() {
		if len(w.In)%8|len(w.UHWIn)%8|len(w.Out)%8|len(w.UHWOut)%8 != 0 {
			return 0, 0, 0, fmt.Errorf("uverbs: extended command %#x has parts of %d, %d, %d and %d bytes, which must be multiples of 8",
				w.Cmd, len(w.In), len(w.UHWIn), len(w.Out), len(w.UHWOut))
		}
		le.PutUint16(b.mem[4:], uint16(len(w.In)/8))
		le.PutUint16(b.mem[6:], uint16(len(w.Out)/8))
		le.PutUint64(b.mem[8:], response)
		le.PutUint16(b.mem[16:], uint16(len(w.UHWIn)/8))
		le.PutUint16(b.mem[18:], uint16(len(w.UHWOut)/8))
		return n, out, outLen, nil
	}
	if n%4 != 0 || outLen%4 != 0 {
		return 0, 0, 0, fmt.Errorf("uverbs: command %d of %d bytes with a response of %d: both must be multiples of 4", w.Cmd, n, outLen)
	}
	le.PutUint16(b.mem[4:], uint16(n/4))
	le.PutUint16(b.mem[6:], uint16(outLen/4))
	if outLen > 0 {
		if len(w.In) < 8 {
			return 0, 0, 0, fmt.Errorf("uverbs: command %d has a response, but no room for its address", w.Cmd)
		}
		le.PutUint64(b.mem[8:], response)
	}
	return n, out, outLen, nil
}
