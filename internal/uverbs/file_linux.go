package uverbs

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
)

// A File is an open device: one kernel context, which ends with it and takes everything that was made in it along. It is
// safe for concurrent use: a command that blocks, as the change of a QP's state may, does not hold up others.
type File struct {
	device string
	driver uint32
	k      Kernel
	legacy atomic.Bool // this kernel's ioctl has no INVOKE_WRITE

	calls  sync.RWMutex // held for reading by every command, for writing by Close
	closed bool         // guarded by calls

	mu     sync.Mutex
	idle   []buffer // guarded by mu: as many as there were commands at a time
	cells  []buffer // guarded by mu: memory for prepared commands that none has
	chunks []buffer // guarded by mu: what the cells are parts of
}

// bufferSize holds the largest command: a query of a GID table of some thousands of entries is made in parts. Pages that
// a command does not use are never touched, and cost nothing.
const bufferSize = 64 << 10

// Open opens the device's character device at path, such as /dev/infiniband/uverbs0. device is the RDMA device's name,
// for errors, and driverID the number of its kernel driver (enum rdma_driver_id), which every ioctl must name. OpenDevice says
// more when it fails.
func Open(path, device string, driverID uint32) (*File, error) {
	fd, err := openRetry(path)
	if err != nil {
		return nil, fmt.Errorf("%s: open %s: %w", device, path, err)
	}
	return NewFile(character{fd}, device, driverID), nil
}

// NewFile is Open for a kernel that the caller brings. The File owns it.
func NewFile(k Kernel, device string, driverID uint32) *File {
	return &File{device: device, driver: driverID, k: k}
}

func openRetry(path string) (int, error) {
	for {
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// Device is the RDMA device's name.
func (f *File) Device() string { return f.device }

// Close ends the context: the kernel destroys what is left in it. Mappings of it have to be gone. It waits for commands in
// progress, and may be called again.
func (f *File) Close() error {
	f.calls.Lock()
	defer f.calls.Unlock()
	if f.closed {
		return nil
	}
	f.closed = true
	err := f.k.Close()
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, b := range append(f.idle, f.chunks...) {
		b.free()
	}
	f.idle, f.cells, f.chunks = nil, nil, nil
	return err
}

// errorf describes a failure that is not the kernel's.
func (f *File) errorf(op string, err error) error { return fmt.Errorf("%s: %s: %w", f.device, op, err) }

// begin returns memory for a command, or why there can be none. After success, end must be called.
func (f *File) begin(op string) (buffer, error) {
	f.calls.RLock()
	if f.closed {
		f.calls.RUnlock()
		return buffer{}, f.errorf(op, net.ErrClosed)
	}
	f.mu.Lock()
	if n := len(f.idle); n > 0 {
		b := f.idle[n-1]
		f.idle = f.idle[:n-1]
		f.mu.Unlock()
		return b, nil
	}
	f.mu.Unlock()
	b, err := newBuffer(bufferSize)
	if err != nil {
		f.calls.RUnlock()
		return buffer{}, f.errorf(op, fmt.Errorf("memory for the command: %w", err))
	}
	return b, nil
}

func (f *File) end(b buffer) {
	f.mu.Lock()
	f.idle = append(f.idle, b)
	f.mu.Unlock()
	f.calls.RUnlock()
}

// Call runs a method of an object. op names it in errors.
func (f *File) Call(op string, object, method uint16, attrs ...Attr) error {
	b, err := f.begin(op)
	if err != nil {
		return err
	}
	defer f.end(b)
	return f.call(b, op, object, method, attrs)
}

func (f *File) call(b buffer, op string, object, method uint16, attrs []Attr) error {
	n, err := b.marshal(f.driver, object, method, attrs)
	if err != nil {
		return f.errorf(op, err)
	}
	for {
		switch errno := f.k.Ioctl(b.mem, b.addr); errno {
		case 0:
			return b.unmarshal(attrs)
		case unix.EINTR:
			// The kernel may have written to the attributes before it gave up.
			if _, err := b.marshal(f.driver, object, method, attrs); err != nil {
				return f.errorf(op, err)
			}
		default:
			clear(b.mem[:n])
			return &CmdError{Device: f.device, Op: op, Errno: errno}
		}
	}
}

// Write runs a command of the write() interface, through the ioctl if this kernel can.
func (f *File) Write(op string, w *WriteCmd) error {
	b, err := f.begin(op)
	if err != nil {
		return err
	}
	defer f.end(b)
	if !f.legacy.Load() {
		err := f.call(b, op, abi.UVERBS_OBJECT_DEVICE, abi.UVERBS_METHOD_INVOKE_WRITE, w.attrs(nil))
		if !noSuchMethod(err) {
			return err
		}
		f.legacy.Store(true)
	}
	return f.write(b, op, w)
}

// noSuchMethod reports whether the kernel does not know the method at all: it has no ioctl, or an older one.
func noSuchMethod(err error) bool {
	return errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EPROTONOSUPPORT)
}

func (f *File) write(b buffer, op string, w *WriteCmd) error {
	n, out, outLen, err := b.legacy(w)
	if err != nil {
		return f.errorf(op, err)
	}
	for {
		k, errno := f.k.Write(b.mem[:n])
		switch {
		case errno == unix.EINTR:
			continue
		case errno != 0:
			return writeError(f.device, op, errno)
		case k != n:
			return f.errorf(op, shortWrite(k, n))
		}
		resp := b.mem[out:][:outLen]
		copy(w.Out, resp)
		copy(w.UHWOut, resp[len(w.Out):])
		return nil
	}
}

func shortWrite(k, n int) error {
	return fmt.Errorf("the kernel took %d bytes of a command of %d", k, n)
}

func writeError(device, op string, errno syscall.Errno) error {
	e := &CmdError{Device: device, Op: op, Errno: errno}
	if errno == unix.EACCES {
		e.Hint = "this process has changed its user, group or capabilities since it opened the device: open it afterwards"
	}
	return e
}

// Mmap maps n bytes of the file from offset on, shared with the kernel; each offset can be mapped once. Munmap gives them
// back.
func (f *File) Mmap(offset int64, n int) ([]byte, error) {
	f.calls.RLock()
	defer f.calls.RUnlock()
	if f.closed {
		return nil, f.errorf("mmap", net.ErrClosed)
	}
	b, err := f.k.Mmap(offset, n)
	if err != nil {
		return nil, f.errorf("mmap", fmt.Errorf("%d bytes at %#x: %w", n, offset, err))
	}
	return b, nil
}

// Munmap ends a mapping. Nobody may touch it any more.
func (f *File) Munmap(mem []byte) error { return f.k.Munmap(mem) }
