package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// What the GNU C library's rand gives, as chars: the first 16 numbers, and those from the 390th on.
func TestGlibcRand(t *testing.T) {
	for seed, want := range map[uint32][2]string{
		0:          {"67c6697351ff4aec29cdbaabf2fbe346", "5e5360aad2b2d085fa54"},
		1:          {"67c6697351ff4aec29cdbaabf2fbe346", "5e5360aad2b2d085fa54"},
		1764220000: {"f4cd7b8d30072cea2eadbffe34725227", "6398f97f3480b872102e"},
		4000000000: {"b5464b905a805e20693ce8bb50612fa9", ""},
	} {
		b := make([]byte, 400)
		glibcRand(seed, b)
		if first, last := hex.EncodeToString(b[:16]), hex.EncodeToString(b[390:]); first != want[0] || want[1] != "" && last != want[1] {
			t.Errorf("seed %d: %s ... %s, want %s", seed, first, last, want)
		}
	}
}

func TestPerftestContent(t *testing.T) {
	now := time.Unix(1764220000, 0)
	want := make([]byte, 8192)
	glibcRand(uint32(now.Unix())-100, want)
	got, err := perftestContent(len(want), want[128:160], []int{0, 64, 128}, now)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("not found: %v", err)
	}
	if _, err := perftestContent(len(want), want[1:33], []int{0, 64, 128}, now); err == nil {
		t.Error("found what is not there")
	}
}

// Where the C program's increase_loc_addr and increase_rem_addr go.
func TestPerftestLayout(t *testing.T) {
	for _, c := range []struct {
		size        int
		bandwidth   bool
		half, whole int
		places      []int
	}{
		{8, true, 4096, 8192, []int{0, 64, 128, 192}},
		{100, true, 4096, 8192, []int{0, 128, 256}},
		{1500, true, 4096, 8192, []int{0, 1536, 0, 1536}},
		{2048, true, 4096, 8192, []int{0, 2048, 0}},
		{2049, true, 4096, 8192, []int{0, 0}},
		{65537, true, 65537, 2 * 65600, []int{0, 0}},
		{8, false, 4096, 8192, []int{0, 0, 0}},
	} {
		l := newPerftestLayout(c.size, perftestIntro{cycle: 4096, line: 64}, c.bandwidth)
		if l.half() != c.half || l.whole() != c.whole {
			t.Errorf("%d bytes: halves of %d in %d", c.size, l.half(), l.whole())
		}
		for i, want := range c.places {
			if l.at(i) != want {
				t.Errorf("%d bytes: message %d at %d, want %d", c.size, i, l.at(i), want)
			}
		}
	}
}

// Keys as the C program prints them (KEY_PRINT_FMT_GID).
const seenKeys = "0000:0001:000011:9b4f2a:00000d5c:000055d0c1a25000:00:00:00:00:00:00:00:00:00:00:ff:ff:0a:4d:00:02:00000000:\x00"

var keysSeen = perftestKeys{at: qp.Endpoint{QPN: 0x11, PSN: 0x9b4f2a, GID: ib.GID{10: 0xff, 11: 0xff, 12: 10, 13: 77, 15: 2}}, reads: 1,
	window: mr.RemoteKey{Addr: 0x55d0c1a25000, RKey: 0xd5c}}

func TestKeysAsPerftestWritesThem(t *testing.T) {
	if got, err := decodeKeys([]byte(seenKeys)); err != nil || got != keysSeen {
		t.Errorf("decoded %+v, %v; want %+v", got, err, keysSeen)
	}
	if b := keysSeen.encode(); string(b) != seenKeys {
		t.Errorf("encoded %q, want %q", b, seenKeys)
	}
	for _, s := range []string{"", seenKeys[1:], seenKeys + "\x00", strings.Replace(seenKeys, ":", "-", 1), strings.Replace(seenKeys, "9b4f2a", "9b4f2g", 1),
		strings.Replace(seenKeys, "9b4f2a:0", "9b4f2a0:", 1), strings.Replace(seenKeys, ":4d:", ":4-:", 1), strings.Replace(seenKeys, "0d5c", "+d5c", 1)} {
		if k, err := decodeKeys([]byte(s)); err == nil {
			t.Errorf("%q was read as %+v", s, k)
		}
	}
}

func FuzzDecodeKeys(f *testing.F) {
	f.Add([]byte(seenKeys))
	f.Add(bytes.Repeat([]byte{'0'}, keysLen))
	f.Fuzz(func(t *testing.T, b []byte) {
		k, err := decodeKeys(b)
		if err != nil {
			return
		}
		if again, err := decodeKeys(k.encode()); err != nil || again != k {
			t.Errorf("%q was read as %+v, and that as %+v, %v", b, k, again, err)
		}
	})
}

// What a peer says that cannot be right ends the meeting.
func TestPerftestIntroductions(t *testing.T) {
	const version, cycle, line, mtu = "6.06\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", "\x00\x00\x10\x00", "\x00\x00\x00\x40", "5\x00"
	for _, c := range []struct {
		said string
		want string // in the error; empty: agreed
	}{
		{version + cycle + line + mtu, ""},
		{version + "\x00\x01\x00\x00" + line + "3\x00", ""},
		{strings.Replace(version, "6", "7", 1), "perftest"},
		{strings.Replace(version, "6.06", "5.5\x00", 1), "perftest"},
		{strings.Repeat("6", 16), "perftest"},
		{version + "\x00\x00\x00\x00", "0 bytes"},
		{version + "\xff\xff\xff\xff", "bytes"},
		{version + cycle + "\x00\x00\x00\x41", "65 bytes"},
		{version + cycle + "\x00\x00\x10\x00" + mtu, ""},
		{version + cycle + "\x00\x00\x20\x00" + mtu, "lines of 8192 bytes"},
		{version + "\x00\x00\x20\x00" + "\x00\x00\x20\x00" + mtu, ""},
		{version + cycle + line + "6\x00", "MTU"},
		{version + cycle + line + "\x00\x00", "MTU"},
		{version + cycle, "waiting"},
	} {
		a, b := net.Pipe()
		go func() {
			b.Write([]byte(c.said)) // as far as anybody reads it
			b.Close()
		}()
		_, err := perftestTalk{conn: readOnly{a}}.introduce(perftestIntro{4096, 64, ib.MTU4096})
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: %v, want %q", c.said, err, c.want)
		}
		a.Close()
	}
}

// readOnly swallows what is written.
type readOnly struct{ net.Conn }

func (readOnly) Write(b []byte) (int, error) { return len(b), nil }

// eachPerftest calls fn for every program and transport service that it has, with sizes that are inline, in a cycle of the memory,
// and of many packets; and polling or with events.
func eachPerftest(t *testing.T, fn func(t *testing.T, o perftest)) {
	for _, program := range perftestPrograms {
		for _, typ := range []ib.QPType{ib.RC, ib.UC, ib.UD} {
			for _, size := range []int{8, 1500, 20000} {
				for _, events := range []bool{false, true} {
					o := perftestDefaults(program)
					o.typ, o.size, o.events, o.check, o.iters = typ, size, events, true, 200
					if size > 4096 {
						o.iters = 60
					}
					if typ != ib.RC {
						o.txDepth = min(o.txDepth, 16)
					}
					if o.usable(ib.PortAttr{MaxMessage: 1 << 30}) != nil || typ == ib.UD && size > 4096 {
						continue
					}
					how := "poll"
					if events {
						how = "events"
					}
					t.Run(fmt.Sprintf("%s/%v/%d/%s", program, typ, size, how), func(t *testing.T) { fn(t, *o) })
				}
			}
		}
	}
}

// Both sides are this program: what it takes the C program to do, it does, too.
func TestPerftestOnSoftwareNIC(t *testing.T) {
	eachPerftest(t, func(t *testing.T, o perftest) {
		ctx := patient(t)
		o.device, o.gid = "soft0", 0
		server, client := o, o
		server.listener, client.port = local(t)
		client.server = "127.0.0.1"
		server.beforeClose, client.beforeClose = together(ctx)
		both(t, func() (fmt.Stringer, error) {
			r, err := server.run(ctx)
			if err == nil && r.lost > 0 { // within a process, and with all receives posted before
				err = fmt.Errorf("%d of %d messages were lost", r.lost, r.iters)
			}
			return r, err
		}, func() (fmt.Stringer, error) { return client.run(ctx) })
	})
}

// A datagram that comes just as a server stops waiting for an event, since the client has sent all, is none that was lost.
func TestPerftestTakesWhatComesLastOnSoftwareNIC(t *testing.T) {
	ctx := patient(t)
	var objects closers
	defer func() {
		var err error
		if objects.closeAll(&err); err != nil {
			t.Error(err)
		}
	}()
	o := perftestDefaults("send_bw")
	o.typ, o.size, o.iters, o.gid, o.events = ib.UD, 8, 2, 0, true
	dev, port, gid, err := openPort("soft0", 1, o.gid, &objects)
	if err != nil {
		t.Fatal(err)
	}
	a, b := net.Pipe()
	server := &perfSide{o: o, ctx: ctx, dev: dev, talk: perftestTalk{a, false}}
	client := &perfSide{o: o, ctx: ctx, dev: dev, talk: perftestTalk{b, true}}
	agreed := perftestIntro{4096, 64, ib.MTU1024}
	for _, s := range []*perfSide{server, client} {
		if err := s.open(port.LID, gid, agreed, &objects); err != nil {
			t.Fatal(err)
		}
	}
	met := make(chan error, 1)
	var ofServer closers
	go func() { met <- server.meet(agreed.mtu, &ofServer) }()
	if err = client.meet(agreed.mtu, &objects); err != nil {
		b.Close() // the server waits for what does not come
	}
	err = errors.Join(err, <-met)
	objects = append(objects, ofServer...)
	if err != nil {
		t.Fatal(err)
	}
	if err := client.post(1); err != nil {
		t.Fatal(err)
	}
	if err := server.take(ctx); err != nil { // the queue pairs have found each other
		t.Fatal(err)
	}
	until, cancel := context.WithCancel(ctx)
	defer cancel()
	err = server.take(endsBy{until, sync.OnceFunc(func() {
		if err := client.post(1); err != nil {
			t.Error(err)
		}
		cancel()
	})})
	if server.received != 2 || err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("%d datagrams received: %v", server.received, err)
	}
}

// endsBy ends when it is first asked, by what end does then.
type endsBy struct {
	context.Context
	end func()
}

func (c endsBy) Done() <-chan struct{} {
	c.end()
	return c.Context.Done()
}

func (c endsBy) Err() error {
	c.end()
	return c.Context.Err()
}

// A client that says that it has sent all, of which nothing has come: neither is what else the server would compare.
func TestPerftestWithoutMessagesOnSoftwareNIC(t *testing.T) {
	dev, err := verbs.Open("soft0")
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	gid, err := dev.GID(1, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, typ := range []ib.QPType{ib.UC, ib.UD} {
		t.Run(typ.String(), func(t *testing.T) {
			ctx := patient(t)
			o := perftestDefaults("send_bw")
			o.typ, o.size, o.iters, o.device, o.gid, o.check = typ, 8, 3, "soft0", 0, true
			l, port := local(t)
			o.listener = l
			ended := make(chan error, 1)
			go func() {
				_, err := o.run(ctx)
				ended <- err
			}()
			conn, err := dial(ctx, "127.0.0.1", port)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			talk := perftestTalk{conn, true}
			if _, err := talk.introduce(perftestIntro{4096, 64, ib.MTU1024}); err != nil {
				t.Fatal(err)
			}
			for range 1 + 3 + 1 { // to meet, until the receives are posted, and that all was sent
				if _, err := talk.keys(perftestKeys{at: qp.Endpoint{GID: gid, QPN: 2}, reads: 1}); err != nil {
					t.Fatal(err)
				}
			}
			if err := <-ended; err == nil || !strings.Contains(err.Error(), "none of 3 messages") {
				t.Errorf("the server's error is %v", err)
			}
		})
	}
}
