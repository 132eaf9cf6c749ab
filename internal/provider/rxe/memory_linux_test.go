package rxe_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// fillRandom writes numbers to b that seed determines.
func fillRandom(b []byte, seed uint64) {
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	r.Read(b)
}

// send writes pattern seed to the region's memory by RDMA, and checks it there.
func (r *rig) send(to *mr.MR, seed uint64) {
	r.t.Helper()
	n := min(to.Len(), r.m.Len())
	fillRandom(r.m.Bytes()[:n], seed)
	off := to.Len() - n
	if seed%2 == 0 {
		off = 0
	}
	r.do(write(r.m.SGE(0, n), to.RemoteRange(off, n)))
	if !bytes.Equal(to.Bytes()[off:][:n], r.m.Bytes()[:n]) {
		r.t.Fatalf("round %d: the memory does not hold what was written to it", seed)
	}
}

const open = ib.AccessLocalWrite | ib.AccessRemoteRead | ib.AccessRemoteWrite

// Go memory stays where it is while it is registered: the collector runs, the heap grows, and what peers write arrives.
func TestRegisteredGoMemory(t *testing.T) {
	r := newRig(t, kernelDevice(t), nil)
	defer r.close()
	var regions []*mr.MR
	for _, n := range []int{64, 5000, 1 << 20} {
		m, err := mr.Register(r.pd, make([]byte, n), open)
		if err != nil {
			t.Fatal(err)
		}
		regions = append(regions, m)
	}
	var junk [][]byte
	for i := range 30 {
		for k := range 50 {
			junk = append(junk, make([]byte, 1<<(k%16)))
		}
		if i%10 == 9 {
			junk = nil
		}
		runtime.GC()
		for _, m := range regions {
			r.send(m, uint64(i))
		}
	}
	runtime.KeepAlive(junk)
	for _, m := range regions { // which alone have held the memory
		testutil.Close(t, m)
	}
}

// Relaxed ordering is a wish: rxe has none, and the region works.
func TestRelaxedOrdering(t *testing.T) {
	r := newRig(t, kernelDevice(t), nil)
	defer r.close()
	m, err := mr.Alloc(r.pd, 64<<10, open|ib.AccessRelaxedOrdering)
	if err != nil {
		t.Fatal(err)
	}
	defer testutil.Close(t, m)
	r.send(m, 1)
}

// What rxe cannot do with memory, and how it says so.
func TestRegistrationRefused(t *testing.T) {
	c := kernelDevice(t)
	pd, err := c.AllocPD()
	if err != nil {
		t.Fatal(err)
	}
	defer testutil.Close(t, pd)
	attr, err := c.QueryDevice()
	if err != nil {
		t.Fatal(err)
	}
	// On-demand paging came to rxe after Linux 6.12.
	m, err := mr.Alloc(pd, 4096, open|ib.AccessOnDemand)
	if attr.Caps.Has(ib.CapODP) {
		if err != nil {
			t.Error(err)
		} else {
			testutil.Close(t, m)
		}
	} else if !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), "on-demand paging") {
		t.Errorf("on-demand paging: %v", err)
	}
	// Persistence is what ordinary memory does not have.
	switch _, err = mr.Alloc(pd, 4096, open|ib.AccessFlushPersistent); {
	case attr.Caps.Has(ib.CapFlushPersistent):
		if !errors.Is(err, unix.EINVAL) {
			t.Errorf("persistent ordinary memory: %v", err)
		}
	case !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), "FLUSH"):
		t.Errorf("flush: %v", err)
	}
	// A dma-buf. rxe has no such operation, and says that before it looks at the descriptor.
	fd, err := dmaBuf(t, 8192)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	_, err = mr.RegisterDMABuf(pd, fd, 0, 8192, 0, open)
	if !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), "dma-buf") {
		t.Errorf("dma-buf: %v", err)
	}
	t.Log(err)
}

// dmaBuf returns a dma-buf of n bytes, if the kernel makes one for user space, which Debian's does not, else a memory file.
func dmaBuf(t *testing.T, n int) (int, error) {
	fd, err := unix.MemfdCreate("dma-buf", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return 0, err
	}
	if err := unix.Ftruncate(fd, int64(n)); err != nil {
		return 0, err
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK); err != nil {
		return 0, err
	}
	u, err := os.OpenFile("/dev/udmabuf", os.O_RDWR, 0)
	if err != nil {
		t.Logf("no dma-buf (%v): a memory file instead", err)
		return fd, nil
	}
	defer u.Close()
	defer unix.Close(fd)
	return udmabufCreate(u, fd, n)
}

// Children come and go while memory is registered and written to: neither the data nor the registration suffers.
func TestChildrenDuringTraffic(t *testing.T) {
	r := newRig(t, kernelDevice(t), nil)
	defer r.close()
	allocated, err := mr.Alloc(r.pd, 256<<10, open)
	if err != nil {
		t.Fatal(err)
	}
	registered, err := mr.Register(r.pd, make([]byte, 256<<10), open)
	if err != nil {
		t.Fatal(err)
	}
	defer testutil.Close(t, allocated, registered)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	children := 0
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if out, err := exec.Command("true").CombinedOutput(); err != nil {
				t.Errorf("%v %s", err, out)
				return
			}
			children++
		}
	})
	for i := range uint64(150) {
		r.send(allocated, i)
		r.send(registered, i)
	}
	close(stop)
	wg.Wait()
	if children == 0 {
		t.Error("no child has run")
	}
	t.Logf("%d children", children)
}

func init() {
	testutil.RegisterChild("locked", lockedChild)
	testutil.RegisterChild("huge", hugeChild)
}

const lockedLimit = 1 << 20

// lockedChild registers more memory than it may lock.
func lockedChild([]string) {
	check := func(err error) {
		if err != nil {
			fmt.Println("failed", err)
			os.Exit(1)
		}
	}
	check(unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: lockedLimit, Max: lockedLimit}))
	check(syscall.Setgid(65534))
	check(syscall.Setuid(65534)) // takes CAP_IPC_LOCK along
	c, err := verbs.Open("rxe0")
	check(err)
	pd, err := c.AllocPD()
	check(err)
	first, err := mr.Alloc(pd, lockedLimit/2, open)
	check(err)
	for _, f := range []func() (*mr.MR, error){
		func() (*mr.MR, error) { return mr.Alloc(pd, 4<<20, open) },
		func() (*mr.MR, error) { return mr.Register(pd, make([]byte, 4<<20), open) },
		func() (*mr.MR, error) { return mr.Alloc(pd, lockedLimit*3/4, open) }, // on top of the first
	} {
		_, err := f()
		if err == nil {
			err = errors.New("it was registered")
		}
		fmt.Println("error", errors.Is(err, unix.ENOMEM), err)
	}
	check(first.Close())
	again, err := mr.Register(pd, make([]byte, lockedLimit*3/4), open) // it is not used up
	check(err)
	check(errors.Join(again.Close(), pd.Close(), c.Close()))
	fmt.Println("done")
}

// A user without privileges hears how much memory had to be pinned, what the limit is, and what to do.
func TestLockedMemoryLimit(t *testing.T) {
	kernelDevice(t)
	if os.Getuid() != 0 {
		testutil.Skip(t, "only root may become somebody else")
	}
	c := testutil.StartChild(t, "locked")
	for _, need := range []int{4 << 20, 4 << 20, lockedLimit * 3 / 4} {
		text := c.Expect("error")
		for _, word := range []string{"true", "reg_mr", strconv.Itoa(need) + " bytes have to be pinned", strconv.Itoa(lockedLimit), "ulimit -l", "LimitMEMLOCK", "CAP_IPC_LOCK"} {
			if !strings.Contains(text, word) {
				t.Errorf("%q does not say %q", text, word)
			}
		}
		t.Log(text)
	}
	c.Expect("done")
	if err := c.Wait(); err != nil {
		t.Error(err)
	}
}

// hugeChild writes by RDMA to a region of reserved huge pages.
func hugeChild([]string) {
	t := &childTB{}
	c, err := verbs.Open("rxe0")
	if err != nil {
		t.Fatal(err)
	}
	r := newRig(t, c, nil)
	m, err := mr.AllocOptions(r.pd, 4<<20, open|ib.AccessHugeTLB, mr.Options{Populate: true})
	if err != nil {
		t.Fatal(err)
	}
	for i := range uint64(20) {
		r.send(m, i)
	}
	// Across the border of two pages.
	fillRandom(r.m.Bytes(), 99)
	r.do(write(r.m.SGE(0, r.m.Len()), m.RemoteRange(2<<20-100, r.m.Len())))
	if !bytes.Equal(m.Bytes()[2<<20-100:][:r.m.Len()], r.m.Bytes()) {
		t.Fatalf("across a page border")
	}
	fmt.Println("page size", pageSizeAt(m.Addr()))
	testutil.Close(t, m)
	r.close()
	testutil.Close(t, c)
	if !t.failed {
		fmt.Println("done")
	}
}

// childTB is a testing.TB for the process of a test's child: what fails is printed, and ends it.
type childTB struct {
	testing.TB
	failed bool
}

func (t *childTB) Helper() {}
func (t *childTB) Fatal(args ...any) {
	fmt.Println("failed", args)
	os.Exit(1)
}
func (t *childTB) Fatalf(format string, args ...any) { t.Fatal(fmt.Sprintf(format, args...)) }
func (t *childTB) Errorf(format string, args ...any) {
	t.failed = true
	fmt.Printf("failed "+format+"\n", args...)
}

// pageSizeAt is the size in KiB of the pages of the mapping that begins at addr.
func pageSizeAt(addr uint64) string {
	text, _ := os.ReadFile("/proc/self/smaps")
	found := false
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, fmt.Sprintf("%x-", addr)) {
			found = true
		}
		if size, ok := strings.CutPrefix(line, "KernelPageSize:"); ok && found {
			return strings.TrimSpace(size)
		}
	}
	return "unknown"
}

// Reserved huge pages, which mr.Alloc takes by itself where there are any.
func TestHugePages(t *testing.T) {
	vmOnly(t)
	const reserve = "/proc/sys/vm/nr_hugepages"
	before, err := os.ReadFile(reserve)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(reserve, []byte("4"), 0); err != nil {
		t.Fatal(err)
	}
	defer os.WriteFile(reserve, before, 0)
	if now, _ := os.ReadFile(reserve); strings.TrimSpace(string(now)) != "4" {
		t.Fatalf("%s huge pages are reserved where 4 were asked for", now)
	}
	c := testutil.StartChild(t, "huge") // as a process looks for them once
	if size := c.Expect("page size"); size != "2048 kB" {
		t.Errorf("pages of %s", size)
	}
	c.Expect("done")
	if err := c.Wait(); err != nil {
		t.Error(err)
	}
}
