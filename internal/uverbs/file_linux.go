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
// safe for concurrent use; commands take turns, because they share the memory that they are built in. Doorbells do not.
type File struct {
	device string
	driver uint32
	fd     int

	mu     sync.Mutex
	buf    buffer
	attrs  []Attr // scratch
	legacy bool   // this kernel's ioctl has no INVOKE_WRITE
	closed atomic.Bool
}

// bufferSize holds the largest command: a query of a GID table of some thousands of entries is made in parts.
const bufferSize = 64 << 10

// Open opens the device's character device at path, such as /dev/infiniband/uverbs0. device is the RDMA device's name,
// for errors, and driverID the number of its kernel driver (enum rdma_driver_id), which every ioctl must name.
func Open(path, device string, driverID uint32) (*File, error) {
	fd, err := openRetry(path)
	if err != nil {
		return nil, openError(path, device, err)
	}
	f := &File{device: device, driver: driverID, fd: fd}
	if f.buf, err = newBuffer(bufferSize); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("%s: memory for commands: %w", device, err)
	}
	return f, nil
}

func openRetry(path string) (int, error) {
	for {
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

func openError(path, device string, err error) error {
	hint := ""
	switch {
	case errors.Is(err, unix.ENOENT):
		hint = "there is no such device node: is udev running, or was the node passed to the container?"
	case errors.Is(err, unix.EACCES):
		hint = "no permission: the node is usually 0666 or of the group rdma"
	case errors.Is(err, unix.EPERM):
		hint = "the device belongs to another network namespace (rdma system show: netns exclusive), or a device cgroup forbids it"
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		hint = "the device was removed"
	}
	if hint != "" {
		hint = " (" + hint + ")"
	}
	return fmt.Errorf("%s: open %s: %w%s", device, path, err, hint)
}

// Device is the RDMA device's name.
func (f *File) Device() string { return f.device }

// FD is the open descriptor, for mmap. It belongs to the File.
func (f *File) FD() int { return f.fd }

// Close ends the context: the kernel destroys what is left in it. Mappings of it have to be gone. It may be called again.
func (f *File) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed.Swap(true) {
		return nil
	}
	err := unix.Close(f.fd)
	f.buf.free()
	return err
}

// Call runs a method of an object. op names it in errors.
func (f *File) Call(op string, object, method uint16, attrs ...Attr) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.callLocked(op, object, method, attrs)
}

func (f *File) callLocked(op string, object, method uint16, attrs []Attr) error {
	if f.closed.Load() {
		return fmt.Errorf("%s: %s: %w", f.device, op, net.ErrClosed)
	}
	if _, err := f.buf.marshal(f.driver, object, method, attrs); err != nil {
		return fmt.Errorf("%s: %s: %w", f.device, op, err)
	}
	for {
		errno := ioctl(f.fd, f.buf)
		if errno == 0 {
			return f.buf.unmarshal(attrs)
		}
		if errno != unix.EINTR {
			return &CmdError{Device: f.device, Op: op, Errno: errno}
		}
	}
}

// Write runs a command of the write() interface, through the ioctl if this kernel can.
func (f *File) Write(op string, w *WriteCmd) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.legacy {
		f.attrs = w.attrs(f.attrs[:0])
		err := f.callLocked(op, abi.UVERBS_OBJECT_DEVICE, abi.UVERBS_METHOD_INVOKE_WRITE, f.attrs)
		if !errors.Is(err, unix.ENOTTY) && !errors.Is(err, unix.EPROTONOSUPPORT) {
			return err
		}
		f.legacy = true
	}
	return f.writeLocked(op, w)
}

func (f *File) writeLocked(op string, w *WriteCmd) error {
	if f.closed.Load() {
		return fmt.Errorf("%s: %s: %w", f.device, op, net.ErrClosed)
	}
	n, out, outLen, err := f.buf.legacy(w)
	if err != nil {
		return fmt.Errorf("%s: %s: %w", f.device, op, err)
	}
	for {
		k, err := unix.Write(f.fd, f.buf.mem[:n])
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			ce := &CmdError{Device: f.device, Op: op, Errno: err.(syscall.Errno)}
			if err == unix.EACCES {
				ce.Hint = "this process has changed its user, group or capabilities since it opened the device: open it afterwards"
			}
			return ce
		case k != n:
			return fmt.Errorf("%s: %s: the kernel took %d bytes of a command of %d", f.device, op, k, n)
		}
		resp := f.buf.mem[out:][:outLen]
		copy(w.Out, resp)
		copy(w.UHWOut, resp[len(w.Out):])
		return nil
	}
}

// Mmap maps n bytes of the file from offset on, shared with the kernel; each offset can be mapped once.
func (f *File) Mmap(offset int64, n int) ([]byte, error) {
	if f.closed.Load() {
		return nil, fmt.Errorf("%s: mmap: %w", f.device, net.ErrClosed)
	}
	b, err := unix.Mmap(f.fd, offset, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("%s: mmap of %d bytes at %#x: %w", f.device, n, offset, err)
	}
	return b, nil
}

// A Doorbell makes the kernel look at the send queue of one QP, as rxe and siw need it: the command POST_SEND without
// work requests. It is built once, and ringing it takes no lock and allocates nothing.
type Doorbell struct {
	f   *File
	buf buffer
	n   int
}

// minWQESize is what the kernel wants to hear as the size of a work request, though there is none.
const minWQESize = 56

// NewDoorbell makes the doorbell of a QP. mem, of at least DoorbellSize bytes outside of the Go heap, is used for as long
// as it rings; it must be aligned to 8 bytes.
func (f *File) NewDoorbell(qp uint32, mem []byte) (*Doorbell, error) {
	var in [abi.PostSendSendWROffset]byte
	putPostSend(in[:], qp, minWQESize)
	d := &Doorbell{f: f, buf: bufferOf(mem)}
	w := WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_POST_SEND, In: in[:], Out: make([]byte, 4)}
	f.mu.Lock()
	legacy := f.legacy
	f.mu.Unlock()
	var err error
	if legacy {
		d.n, _, _, err = d.buf.legacy(&w)
	} else {
		_, err = d.buf.marshal(f.driver, abi.UVERBS_OBJECT_DEVICE, abi.UVERBS_METHOD_INVOKE_WRITE, w.attrs(nil))
	}
	if err != nil {
		return nil, fmt.Errorf("%s: doorbell: %w", f.device, err)
	}
	return d, nil
}

// DoorbellSize is the memory that a Doorbell needs.
const DoorbellSize = 128

// Ring makes the kernel look. One goroutine at a time may call it, and none when the QP or the File is being closed. It
// may block for as long as the kernel works on the queue, with the P given to others.
func (d *Doorbell) Ring() error {
	for {
		var errno syscall.Errno
		if d.n == 0 {
			errno = ioctl(d.f.fd, d.buf)
		} else if _, err := unix.Write(d.f.fd, d.buf.mem[:d.n]); err != nil {
			errno = err.(syscall.Errno)
		}
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
			continue
		}
		return &CmdError{Device: d.f.device, Op: "post_send", Errno: errno}
	}
}
