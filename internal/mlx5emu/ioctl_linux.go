package mlx5emu

import (
	"encoding/binary"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
)

// Commands, as RDMA_VERBS_IOCTL takes them. What is refused, and with which error, follows the kernel's
// drivers/infiniband/core/uverbs_ioctl.c.

const (
	headerSize = 24 // struct ib_uverbs_ioctl_hdr
	attrSize   = 16 // struct ib_uverbs_attr
	maxCommand = 4096
)

var native = binary.NativeEndian

// kind is what an attribute is.
type kind uint8

const (
	kindIn        kind = iota // data for the device; 8 bytes and less lie in the attribute itself
	kindOut                   // where data goes
	kindConst                 // a number
	kindHandle                // of an object
	kindNewHandle             // of the object that the method makes
	kindFD                    // a descriptor of the client's
	kindNewFD                 // of the file that the method opens
)

// An attrSpec is an attribute that a method knows.
type attrSpec struct {
	id       uint16
	kind     kind
	need     bool
	min, max int  // bytes of kindIn and kindOut
	longer   bool // more is taken: of kindIn if it is zero, of kindOut it is left alone
}

// A method is what a command may ask for.
type method struct {
	attrs []attrSpec
	early bool // may come before there is a context
	run   func(*call) syscall.Errno
}

// An attr is an attribute of a command, within its method's limits.
type attr struct {
	spec *attrSpec
	at   int // its offset in the command
	n    int
	data uint64
	in   []byte // kindIn
}

// A call is a command that is being executed.
type call struct {
	c     *Context
	cmd   []byte
	files FilePasser
	attrs []attr
}

// Ioctl executes the command cmd, a struct ib_uverbs_ioctl_hdr and its attributes, as read from the client. What attributes
// point to is in the client's memory; the flags and new handles in cmd are changed in place, also if the command fails: the
// caller shows them to the client.
func (c *Context) Ioctl(cmd []byte, files FilePasser) syscall.Errno {
	if len(cmd) < headerSize || len(cmd) > maxCommand {
		return unix.EINVAL
	}
	length, object, methodID, n := native.Uint16(cmd[0:]), native.Uint16(cmd[2:]), native.Uint16(cmd[4:]), int(native.Uint16(cmd[6:]))
	if int(length) != headerSize+attrSize*n || int(length) > len(cmd) {
		return unix.EINVAL
	}
	if native.Uint64(cmd[8:]) != 0 || native.Uint32(cmd[20:]) != 0 {
		return unix.EPROTONOSUPPORT
	}
	if native.Uint32(cmd[16:]) != abi.RDMA_DRIVER_MLX5 {
		return unix.EINVAL
	}
	m := c.method(object, methodID)
	if m == nil {
		return unix.EPROTONOSUPPORT
	}
	c.calls.RLock()
	defer c.calls.RUnlock()
	if c.closed {
		return unix.EBADF
	}
	r := &call{c: c, cmd: cmd[:length], files: files}
	if errno := r.parse(m, n); errno != 0 {
		return errno
	}
	if !m.early && !c.ready() {
		return unix.EINVAL
	}
	return m.run(r)
}

func (c *Context) method(object, id uint16) *method {
	if object == abi.MLX5_IB_OBJECT_UAR && c.dev.cfg.StaticUARs {
		return nil
	}
	return methods[methodKey(object, id)]
}

func methodKey(object, id uint16) uint32 { return uint32(object)<<16 | uint32(id) }

// parse checks the n attributes against what the method knows.
func (r *call) parse(m *method, n int) syscall.Errno {
	r.attrs = make([]attr, 0, len(m.attrs))
	for i := range n {
		at := headerSize + attrSize*i
		p := r.cmd[at:][:attrSize]
		id, size, flags, data := native.Uint16(p[0:]), int(native.Uint16(p[2:])), native.Uint16(p[4:]), native.Uint64(p[8:])
		var spec *attrSpec
		for k := range m.attrs {
			if m.attrs[k].id == id {
				spec = &m.attrs[k]
			}
		}
		if spec == nil {
			if flags&abi.UVERBS_ATTR_F_MANDATORY != 0 {
				return unix.EPROTONOSUPPORT
			}
			continue
		}
		if r.attr(id) != nil || native.Uint16(p[6:]) != 0 {
			return unix.EINVAL
		}
		a := attr{spec: spec, at: at, n: size, data: data}
		if errno := r.check(&a); errno != 0 {
			return errno
		}
		r.attrs = append(r.attrs, a)
	}
	for k := range m.attrs {
		if m.attrs[k].need && r.attr(m.attrs[k].id) == nil {
			return unix.EINVAL
		}
	}
	return 0
}

// check checks one attribute, and fetches what it points to.
func (r *call) check(a *attr) syscall.Errno {
	switch a.spec.kind {
	case kindIn, kindOut:
		if a.n < a.spec.min || a.n > a.spec.max && !a.spec.longer {
			return unix.EINVAL
		}
		if a.spec.kind == kindOut {
			return 0
		}
		a.in = make([]byte, a.n)
		if a.n <= 8 {
			var b [8]byte
			native.PutUint64(b[:], a.data)
			copy(a.in, b[:])
		} else if r.c.mem.ReadAt(a.in, a.data) != nil {
			return unix.EFAULT
		}
		if a.n > a.spec.max {
			for _, b := range a.in[a.spec.max:] {
				if b != 0 {
					return unix.EOPNOTSUPP
				}
			}
			a.in = a.in[:a.spec.max]
		}
	case kindConst:
		if a.n != 8 {
			return unix.EINVAL
		}
	default:
		if a.n != 0 {
			return unix.EINVAL
		}
	}
	return 0
}

// attr returns the attribute with that number, or nil if the client has not given it.
func (r *call) attr(id uint16) *attr {
	for i := range r.attrs {
		if r.attrs[i].spec.id == id {
			return &r.attrs[i]
		}
	}
	return nil
}

// num is the number in a constant, handle or descriptor, or in data of up to 8 bytes; 0 if it was not given.
func (r *call) num(id uint16) uint64 {
	a := r.attr(id)
	switch {
	case a == nil:
		return 0
	case a.spec.kind == kindIn:
		var b [8]byte
		copy(b[:], a.in)
		return native.Uint64(b[:])
	}
	return a.data
}

// in is data that the client gave, or nil.
func (r *call) in(id uint16) []byte {
	if a := r.attr(id); a != nil {
		return a.in
	}
	return nil
}

// outSize is how much the client has room for; 0 if it does not want to hear it.
func (r *call) outSize(id uint16) int {
	if a := r.attr(id); a != nil {
		return a.n
	}
	return 0
}

// out gives the client data, as far as it has room, and zeroes behind it.
func (r *call) out(id uint16, b []byte) syscall.Errno {
	a := r.attr(id)
	if a == nil || a.n == 0 {
		return 0
	}
	full := make([]byte, a.n)
	copy(full, b)
	if r.c.mem.WriteAt(full, a.data) != nil {
		return unix.EFAULT
	}
	flags := r.cmd[a.at+4:]
	native.PutUint16(flags, native.Uint16(flags)|abi.UVERBS_ATTR_F_VALID_OUTPUT)
	return 0
}

func (r *call) out32(id uint16, v uint32) syscall.Errno {
	var b [4]byte
	native.PutUint32(b[:], v)
	return r.out(id, b[:])
}

func (r *call) out64(id uint16, v uint64) syscall.Errno {
	var b [8]byte
	native.PutUint64(b[:], v)
	return r.out(id, b[:])
}

// newNumber puts the number of what was made into its attribute.
func (r *call) newNumber(id uint16, v uint64) {
	if a := r.attr(id); a != nil {
		native.PutUint64(r.cmd[a.at+8:], v)
	}
}

// firstOf returns the first error.
func firstOf(errs ...syscall.Errno) syscall.Errno {
	for _, e := range errs {
		if e != 0 {
			return e
		}
	}
	return 0
}
