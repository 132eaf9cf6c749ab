package uverbstest

import (
	"encoding/binary"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

var ne = binary.NativeEndian

// A Kernel is what the kernels that providers' tests play have in common. It answers the commands that are the same with every driver;
// who embeds it has the others, and what devices and processes share. Offsets are those of the kernel's headers, written out: package abi
// is part of what is tested.
type Kernel struct {
	Objects
	Mu       sync.Mutex               // held while a command is answered
	Commands []uint32                 // of the write interface, in order, without doorbells
	Errs     map[uint32]syscall.Errno // command -> what it ends with
	During   map[uint32]func()        // command -> called when it has come, without Mu
	Channel  int                      // where events of the last completion channel are written
	Offset   uint64                   // of the memory that was shared last

	// Own answers a command of the driver's own, or fills in what is the driver's and returns AsUsual.
	Own func(c *Command) syscall.Errno
	// Method is Own for the methods that are no commands of the write interface: its number above the object's.
	Method func(id uint32, a Attrs) syscall.Errno
	// Tweak changes what was answered to a command, and to the driver.
	Tweak func(cmd uint32, out, driver []byte)

	driver uint32
	ring   Command           // so that Ring allocates nothing
	shared map[uint64][]byte // by offset
	all    [][]byte
}

// AsUsual has Kernel answer.
const AsUsual = ^syscall.Errno(0)

// A Command is one of the write interface.
type Command struct {
	Number              uint32
	In, Out             []byte
	DriverIn, DriverOut []byte // the driver's own
}

// An Attr is an attribute of a method.
type Attr struct {
	Data  []byte // what it points to, or has in itself
	Value []byte // its 8 bytes
}

// Attrs are those of a method, by their numbers.
type Attrs map[uint16]Attr

// The attributes that have the driver's own bytes (UVERBS_ATTR_UHW_IN and UVERBS_ATTR_UHW_OUT).
const (
	DriverIn  = 0x1000
	DriverOut = 0x1001
)

// Init makes the kernel of a test, with a driver of that number; see Objects.Init.
func (k *Kernel) Init(t testing.TB, driver uint32) {
	t.Helper()
	k.Objects.Init(t)
	k.driver, k.Errs, k.During, k.shared = driver, map[uint32]syscall.Errno{}, map[uint32]func(){}, map[uint64][]byte{}
	t.Cleanup(func() { // when all that uses it is closed; a process that fuzzes has many kernels
		for _, mem := range k.all {
			unix.Munmap(mem)
		}
	})
}

// Share makes memory that the provider can map, once, at the offset that is returned. The test may use it as long as it runs.
func (k *Kernel) Share(n int) (mem []byte, offset uint64) {
	mem, err := unix.Mmap(-1, 0, (n+4095)&^4095, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		k.t.Fatal(err)
	}
	k.Offset += 4096
	k.shared[k.Offset], k.all = mem, append(k.all, mem)
	return mem, k.Offset
}

// Mmap implements uverbs.Kernel, of memory that is shared.
func (k *Kernel) Mmap(offset int64, n int) ([]byte, error) {
	k.Mu.Lock()
	defer k.Mu.Unlock()
	mem := k.shared[uint64(offset)]
	if mem == nil || n > len(mem) {
		return nil, unix.EINVAL
	}
	delete(k.shared, uint64(offset))
	k.Mapped++
	return mem[:n], nil
}

// Munmap implements uverbs.Kernel. It leaves the memory, but nobody may touch it any more.
func (k *Kernel) Munmap(mem []byte) error {
	k.Mu.Lock()
	defer k.Mu.Unlock()
	k.Mapped--
	return unix.Mprotect(mem, unix.PROT_NONE)
}

// Close implements uverbs.Kernel.
func (k *Kernel) Close() error { return nil }

// Write implements uverbs.Kernel: this one takes commands by ioctl.
func (k *Kernel) Write([]byte) (int, syscall.Errno) { return 0, unix.ENOSYS }

// Ring implements uverbs.Kernel, for prepared commands.
func (k *Kernel) Ring(cmd []byte) (int, syscall.Errno) {
	k.Mu.Lock()
	defer k.Mu.Unlock()
	if n := int(ne.Uint16(cmd[4:])) * 4; n != len(cmd) {
		k.t.Errorf("a command of %d bytes, written in %d", n, len(cmd))
	}
	k.ring = Command{Number: ne.Uint32(cmd), In: cmd[8:]}
	return len(cmd), k.run(&k.ring)
}

// Ioctl implements uverbs.Kernel.
func (k *Kernel) Ioctl(cmd []byte, addr uint64) syscall.Errno {
	k.Mu.Lock()
	defer k.Mu.Unlock()
	attrs := Attrs{}
	for i := range int(ne.Uint16(cmd[6:])) {
		b := cmd[24+16*i:][:16]
		n, a := int(ne.Uint16(b[2:])), Attr{Value: b[8:]}
		if at := ne.Uint64(b[8:]) - addr; n > 0 && at < uint64(len(cmd)) {
			a.Data = cmd[at:][:n]
		} else if n <= 8 {
			a.Data = b[8:][:n]
		}
		attrs[ne.Uint16(b)] = a
	}
	if d := ne.Uint32(cmd[16:]); d != k.driver {
		k.t.Errorf("driver %d", d)
	}
	id := ne.Uint32(cmd[2:])
	if k.Method != nil {
		if e := k.Method(id, attrs); e != AsUsual {
			return e
		}
	}
	switch id {
	case 0x00000000: // INVOKE_WRITE
		return k.run(&Command{uint32(ne.Uint64(attrs[2].Value)), attrs[0].Data, attrs[1].Data, attrs[DriverIn].Data, attrs[DriverOut].Data})
	case 0x00030000: // GET_CONTEXT
		ne.PutUint32(attrs[0].Data, 1)
		ne.PutUint64(attrs[1].Data, 1)
	case 0x00000010: // ASYNC_EVENT
		ne.PutUint64(attrs[0].Value, uint64(k.Async[0]))
	default:
		k.t.Errorf("unexpected method %d of object %d", id>>16, id&0xffff)
		return unix.EPROTONOSUPPORT
	}
	return 0
}

const postSend = 28 // the doorbell

func (k *Kernel) run(c *Command) syscall.Errno {
	if c.Number != postSend {
		k.Commands = append(k.Commands, c.Number)
	}
	if f := k.During[c.Number]; f != nil {
		k.Mu.Unlock()
		f()
		k.Mu.Lock()
	}
	if e := k.Errs[c.Number]; e != 0 && c.Number != postSend { // Own looks at each doorbell
		return e
	}
	e := k.Own(c)
	if e == AsUsual {
		e = k.usual(c)
	}
	if k.Tweak != nil {
		k.Tweak(c.Number, c.Out, c.DriverOut)
	}
	return e
}

// usual answers what is the same with every driver.
func (k *Kernel) usual(c *Command) syscall.Errno {
	in, out := c.In, c.Out
	switch c.Number {
	case 3: // ALLOC_PD
		ne.PutUint32(out, k.Handle("pd"))
	case 4:
		return k.Destroy(ne.Uint32(in), "pd")
	case 5: // CREATE_AH
		ne.PutUint32(out, k.Handle("ah"))
	case 8:
		return k.Destroy(ne.Uint32(in), "ah")
	case 9: // REG_MR
		h := k.Handle("mr")
		ne.PutUint32(out, h)
		ne.PutUint32(out[4:], h<<8|0x42)
		ne.PutUint32(out[8:], h<<8|0x42)
	case 13:
		return k.Destroy(ne.Uint32(in), "mr")
	case 14: // ALLOC_MW
		h := k.Handle("mw")
		ne.PutUint32(out, h)
		ne.PutUint32(out[4:], h<<8|0x20)
	case 16:
		return k.Destroy(ne.Uint32(in), "mw")
	case 17: // CREATE_COMP_CHANNEL: a pipe, of which the provider gets the reading end
		var fds [2]int
		if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
			k.t.Fatal(err)
		}
		k.t.Cleanup(func() { unix.Close(fds[1]) })
		k.Channel = fds[1]
		ne.PutUint32(out, uint32(fds[0]))
	case 20:
		return k.Destroy(ne.Uint32(in[8:]), "cq")
	case 23: // REQ_NOTIFY_CQ
	case 27:
		return k.Destroy(ne.Uint32(in[8:]), "qp")
	case postSend:
		return k.Errs[postSend]
	case 33: // MODIFY_SRQ
	case 34: // QUERY_SRQ: the limit
		ne.PutUint32(out[8:], 5)
	case 35:
		return k.Destroy(ne.Uint32(in[8:]), "srq")
	default:
		k.t.Errorf("unexpected command %d", c.Number)
		return unix.ENOSYS
	}
	return 0
}

// Count returns how many commands of that number have come.
func (k *Kernel) Count(cmd uint32) (n int) {
	k.Mu.Lock()
	defer k.Mu.Unlock()
	for _, c := range k.Commands {
		if c == cmd {
			n++
		}
	}
	return n
}
